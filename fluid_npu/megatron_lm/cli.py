"""``fluid-npu megatron-lm apply|revert|status CHECKOUT``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fluid_npu.megatron_lm import launch_patch
from fluid_npu.megatron_lm.checkout import Checkout, CheckoutError, open_checkout

OK, NOT_APPLIED, REFUSED = 0, 1, 2
_EXIT_CODES = """exit codes:
  0  done, or nothing to do; status: the line is there
  1  status: the line is not there
  2  refused: no checkout, an unsupported version, or a script that was changed; nothing was written"""
_ACTIONS = {
    "apply": "adds `import fluid_npu.megatron_adaptor` after `import torch` in pretrain_gpt.py; twice is once",
    "revert": "takes that line out again; everything else stays",
    "status": "says whether the line is there, and the checkout's version",
}


def add_megatron_lm_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register ``megatron-lm``; the parsed arguments carry ``func(args) -> exit code``."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "megatron-lm",
        help="put the one launch line into a Megatron-LM checkout, or take it out",
        description="Edits pretrain_gpt.py of a Megatron-LM checkout: one line, which switches fluid_npu on.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    for name, text in _ACTIONS.items():
        action = actions.add_parser(
            name, help=text, description=text, epilog=_EXIT_CODES, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        action.add_argument("checkout", type=Path, metavar="CHECKOUT", help="folder that holds pretrain_gpt.py")
        action.add_argument("--json", action="store_true", help="print JSON for machines")
        action.set_defaults(func=run, action=name)
    return parser


def run(args: argparse.Namespace) -> int:
    """Does one action and says what happened."""
    try:
        checkout = open_checkout(args.checkout)
        patch = launch_patch.patch_for(checkout)
        done = _ACT[args.action](checkout, patch)
    except (CheckoutError, OSError) as error:
        if args.json:
            print(json.dumps({"action": args.action, "checkout": str(args.checkout), "error": str(error)}))
        print(f"fluid-npu megatron-lm {args.action}: {error}", file=sys.stderr)
        return REFUSED
    applied = done if args.action == "status" else args.action == "apply"
    result = {
        "action": args.action,
        "checkout": str(args.checkout),
        "megatron_core": checkout.version,
        "patch": patch.name,
        "line": patch.added,
        "applied": applied,
        "changed": done and args.action != "status",
    }
    print(json.dumps(result) if args.json else _sentence(result))
    return NOT_APPLIED if args.action == "status" and not applied else OK


def _sentence(result: dict[str, Any]) -> str:
    where = f"{result['checkout']}/pretrain_gpt.py (megatron.core {result['megatron_core']})"
    if result["changed"]:
        verb = "added to" if result["action"] == "apply" else "taken out of"
        return f"`{result['line']}` {verb} {where}"
    return f"`{result['line']}` is {'in' if result['applied'] else 'not in'} {where}" + (
        "" if result["action"] == "status" else "; nothing to do"
    )


def _status(checkout: Checkout, patch: launch_patch.LaunchPatch) -> bool:
    return launch_patch.is_applied(checkout, patch)


_ACT = {"apply": launch_patch.apply, "revert": launch_patch.revert, "status": _status}
