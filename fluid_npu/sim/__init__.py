"""A simulated Ascend NPU: the unmodified torch_npu wheel on CANN libraries that compute on the CPU.

``fluid-npu sim exec -- COMMAND`` runs a command on it. README.md beside this file says what it proves and what not.
"""
