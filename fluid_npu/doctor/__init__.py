"""``fluid-npu doctor``: what is on this machine, what is wrong, and what to do next.

Every check is a function of its inputs (an environment, a list of paths, facts asked of a child process), so that a
test can plant each finding. Nothing heavy is imported in this process: a torch that does not import, a driver that
hangs or a MindSpeed that dies are findings and never a traceback.
"""
