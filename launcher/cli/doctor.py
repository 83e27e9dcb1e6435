"""`zerofleet doctor`: what is wrong with the machines of a profile."""

import contextlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from launcher.orchestration.doctor import Examination

UNFIT = 2


def doctor(
    profile: Annotated[str | None, typer.Option(help="Whose machines. Default: local.")] = None,
    run_dir: Annotated[Path, typer.Option(help="A folder that all nodes must see.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Examine each node and the network between them; exit code 2 when a run would fail.

    Versions and code are compared, and the GPUs, memory, disks, clocks and the run directory looked at; every pair of
    nodes is measured, and all-reduces over all of them and over halves, down to the slow or unreachable node, which is
    named. What was measured is kept, and compared the next time.
    """
    from cluster.profile import load_profile
    from launcher.submit import examine_profile

    where = load_profile(profile)
    run_dir.mkdir(parents=True, exist_ok=True)
    with contextlib.redirect_stdout(sys.stderr):
        found = examine_profile(where, run_dir.absolute())
    if as_json:
        links = [{"from": one, "to": other, **link} for (one, other), link in found.links.items()]
        findings = [asdict(finding) for finding in found.findings]
        groups = [{"nodes": list(group), **link} for group, link in found.collectives.groups.items()]
        facts = {
            "nodes": found.nodes,
            "links": links,
            "all_reduce": found.collectives.whole,
            "all_reduces": groups,
            "findings": findings,
            "seconds": found.seconds,
        }
        print(json.dumps(facts, indent=1))
    else:
        print("\n".join(_lines(found)))
    if any(finding.level == "error" for finding in found.findings):
        raise typer.Exit(UNFIT)


def _lines(found: "Examination") -> list[str]:
    lines = [
        f"{name}: {facts['cpus']} CPUs, {facts['memory_available'] / 2**30:.1f} of "
        f"{facts['memory_total'] / 2**30:.1f} GiB memory free, {len(facts['gpus'])} GPUs, "
        f"run directory {facts['run_free'] / 2**30:.1f} GiB free, "
        f"python {facts['versions']['python']}, torch {facts['versions']['torch']}, "
        f"deepspeed {facts['versions']['deepspeed']}, ray {facts['versions']['ray']}"
        for name, facts in found.nodes.items()
    ]
    if found.bandwidth is not None:
        latencies = sorted(link["latency_s"] for link in found.links.values() if "error" not in link)
        lines.append(
            f"network, {len(found.links)} links: median {found.bandwidth / 1e6:,.0f} MB/s, "
            f"{latencies[len(latencies) // 2] * 1e6:,.0f} us"
        )
    whole = found.collectives.whole
    if whole is not None and "error" not in whole:
        lines.append(
            f"all-reduce over all of them: {whole['bytes_per_second'] / 1e6:,.0f} MB/s (bus bandwidth), "
            f"{whole['latency_s'] * 1e6:,.0f} us"
        )
    lines += [str(finding) for finding in found.findings]
    worst = {finding.level for finding in found.findings}
    verdict = "fit" if not worst else "a run would fail" if "error" in worst else "fit, with warnings"
    return [*lines, f"{verdict}; examined in {found.seconds:.1f} s"]
