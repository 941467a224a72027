"""Names of the routing workloads, for the command line; ``workloads`` says what they are. Standard library only."""

DESCRIPTIONS = {
    "W0": "balanced",
    "W1": "hot experts",
    "W2": "hot rank",
    "W3": "spread",
    "W4": "ragged sources",
    "W5": "zero load",
    "W6": "rotating",
    "W7": "burst",
}
