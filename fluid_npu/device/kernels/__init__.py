"""The maths of each device behind one interface (``base.Kernels``)."""
