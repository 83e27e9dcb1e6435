"""What exists before there is a Ray address or outlives the driver: allocations, Ray processes, jobs, their records.

This package never imports ``launcher``, torch or deepspeed. What crosses the seam is argv, environment, resources and
files in the run directory. Leaf modules that both sides read: ``errors``, ``strict_yaml`` and ``validation``.
"""
