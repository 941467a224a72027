"""A slow network on one machine: ranks in network namespaces, joined by links with a rate limit.

On a loopback an AllToAll is CPU work and nothing can hide it. Here its bytes leave the sender at the rate of a real
network while both processors are free, which is what overlap needs. Linux, root and iproute2; ``why_unavailable``
says what is missing. Standard library only. A launcher that starts its ranks and their store this way:

    with make_network(nproc, parse_link("1gbit")) as network:  # None: the loopback, same code
        listener = network.listen()
        env = {**rank_environment(...), **network.environment()}
        rank = network.in_rank(0, lambda: subprocess.Popen(command, env=env))
        store = network.in_hub(lambda: host_store(listener))

Addresses of the link have no names, which torch's store warns of: set TORCH_CPP_LOG_LEVEL=ERROR before it is imported.
gloo's AllToAll posts its send before its receive: a rank that arrives first waits until the other's data has passed
before its own follows, so an exchange takes bytes/rate or, with a late rank, up to twice that.
"""

from fluid_npu.link.errors import LinkError
from fluid_npu.link.network import Loopback, Network, SlowLink, make_network
from fluid_npu.link.rate import LinkSpec, parse_link
from fluid_npu.link.requirements import why_unavailable

__all__ = ["LinkError", "LinkSpec", "Loopback", "Network", "SlowLink", "make_network", "parse_link", "why_unavailable"]
