"""A stand-in for MindSpeed in tests: it patches Megatron as MindSpeed does, and is written from scratch.

Kept on purpose, because ours must live with it: the name suffix that makes a function a wrapper, the sweep over all
imported modules by name and id, objects rebuilt from the one seen first, modules made up where a package is missing,
state in a class for the whole process, argv read at import, and a remove that passes over modules with 'mindspeed' in
their name.
"""
