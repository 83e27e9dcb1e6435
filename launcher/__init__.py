"""ZeroFleet's launcher: recipes, plans, worker groups and training, once there is a Ray address.

Floors, each importing only downwards: ``cli > submit > orchestration > training > tasks > models | data > planning >
recipe > errors``. torch begins at ``models`` and ``data``; ``submit`` is the only door to the backends of ``cluster``.
"""
