"""The sizes that a run can have when nodes come and go. Pure but for the plan's files in the run directory."""

import json

from launcher.errors import PlanError
from launcher.planning.plan import Plan, replan
from launcher.run_directory import RunDirectory, write_atomically


class Elastic:
    """Plans of one run for other numbers of nodes: the same global batch, the same model-parallel sizes.

    Args:
        full: the plan with all nodes.
        run_directory: of the run.
    """

    def __init__(self, full: Plan, run_directory: RunDirectory) -> None:
        self.full = full
        self.run_directory = run_directory
        self.min_nodes = full.resources.min_nodes or full.resources.nodes

    def plan_for(self, nodes: int) -> Plan | None:
        """The plan with so many nodes, or None when the global batch or the layout cannot be kept with them."""
        if nodes == self.full.resources.nodes:
            return self.full
        try:
            return replan(self.full, nodes * self.full.resources.workers_per_node)
        except PlanError:
            return None

    def largest(self, available: int) -> int | None:
        """The largest number of nodes, of those that are there, that the run can use; None when there are too few."""
        most = min(available, self.full.resources.nodes)
        sizes = range(most, self.min_nodes - 1, -1)
        return next((nodes for nodes in sizes if self.plan_for(nodes) is not None), None)

    def write(self, nodes: int) -> Plan:
        """Let the next attempt's workers find the plan for so many nodes, and the next driver the full one.

        Raises:
            PlanError: there is no plan for this size.
        """
        whole = nodes == self.full.resources.nodes
        plan = self.full if whole else replan(self.full, nodes * self.full.resources.workers_per_node)
        if whole:
            self.run_directory.full_plan.unlink(missing_ok=True)
        else:
            write_atomically(self.run_directory.full_plan, self.full.model_dump_json(indent=1))
        write_atomically(self.run_directory.plan, plan.model_dump_json(indent=1))
        write_atomically(self.run_directory.deepspeed, json.dumps(plan.deepspeed_config, indent=2) + "\n")
        return plan
