"""What differs between the supported lines of megatron-core, decided by what is there never by a version number.

The rest of ``mcore`` imports from here and reads the same on every line. Which line has what:
docs/MEGATRON_VERSIONS.md.
"""
