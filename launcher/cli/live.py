"""The console of a running run: one live line on a terminal, plain lines elsewhere, and the closing summary."""

import contextlib
import sys
import time
from typing import TYPE_CHECKING, Any

from launcher.cli.plan_text import beside_lines
from launcher.orchestration.progress import Pace, progress_line, readable_seconds
from launcher.orchestration.states import GroupStatus, RunState
from launcher.run_directory import RunDirectory

if TYPE_CHECKING:
    from launcher.planning.plan import Plan

PLAIN_INTERVAL_S = 10.0


class LiveObserver:
    """Shows a run: rewrites one line on a terminal; elsewhere writes a line when something new is known."""

    def __init__(self, plan: "Plan", run_directory: RunDirectory, *, quiet: bool = False) -> None:
        self.plan = plan
        self.run_directory = run_directory
        self.quiet = quiet
        self.stream = sys.stderr
        self.live = self.stream.isatty()
        self._shown = ""
        self._last_plain = 0.0
        self._last_record: dict[str, Any] = {}
        self.pace = Pace()

    def event(self, state: RunState, facts: dict[str, Any]) -> None:
        """Show a change of state."""
        text = {
            RunState.STARTING: f"data ready after {facts.get('seconds_to_prepare', 0)} s; starting Ray workers",
            RunState.RUNNING: f"attempt {facts.get('attempt')}: {len(facts.get('workers', []))} workers started",
            RunState.RECOVERING: f"restarting from {_origin(facts)} (restart {facts.get('restart')})",
            RunState.RESIZING: f"going on with {facts.get('nodes')} nodes: {facts.get('reason', '')}",
            RunState.WAITING: f"waiting for nodes: {facts.get('reason', '')}",
            RunState.FAILED: f"failed: {facts.get('reason', '')}",
        }.get(state)
        if text:
            self.message(text)

    def message(self, text: str) -> None:
        """Write a line that stays."""
        with contextlib.suppress(OSError), self.run_directory.driver_log.open("a", encoding="utf-8") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        if not self.quiet:
            self._clear()
            self.stream.write(text + "\n")
            self.stream.flush()

    def progress(self, status: GroupStatus) -> None:
        """Show the newest heartbeat of rank 0."""
        beat = status.beats.get(0)
        if beat is None or self.quiet:
            return
        remaining = self.pace.remaining(time.monotonic(), beat.step, beat.max_steps)
        line = progress_line(beat.step, beat.max_steps, beat.metrics, beat.phase.value, remaining)
        if self.live:
            self._clear()
            self.stream.write(line)
            self.stream.flush()
            self._shown = line
        elif beat.metrics != self._last_record and time.monotonic() - self._last_plain >= PLAIN_INTERVAL_S:
            self._last_plain, self._last_record = time.monotonic(), beat.metrics
            self.stream.write(line + "\n")
            self.stream.flush()

    def _clear(self) -> None:
        if self._shown:
            self.stream.write("\r\x1b[2K")
            self._shown = ""

    def close(self) -> None:
        """Leave the cursor on a fresh line."""
        if self._shown:
            self.stream.write("\n")
            self.stream.flush()
            self._shown = ""


def _origin(facts: dict[str, Any]) -> str:
    step = facts.get("kept_step")
    return "the last checkpoint" if step is None else f"the state of step {step} in memory"


def print_summary(summary: dict[str, Any], plan: "Plan", run_directory: RunDirectory) -> None:
    """Print how a run ended, and what to do next."""
    name = plan.recipe.name
    if summary.get("already_complete"):
        print(
            f"{name} is complete already ({summary['step']} steps): nothing to do. Start anew with another --run-dir."
        )
    elif summary["status"] == "complete":
        early = ", stopped early by the validation loss" if summary["early_stopped"] else ""
        print(f"{name}: complete, {summary['step']} steps{early}, in {readable_seconds(summary['seconds'])}")
    else:
        print(f"{name}: stopped and saved at step {summary['step']}; the same command continues")
    for label, text in _facts(summary):
        print(f"  {label:<22}{text}")
    for line in beside_lines(plan, summary):
        print(f"  {line}")
    print(f"  {'look at it with':<22}zerofleet tensorboard {_relative(run_directory)}")


_SHOWN_ELSEWHERE = ("eval_loss", "eval_perplexity", "eval_targets")


def _facts(summary: dict[str, Any]) -> list[tuple[str, str]]:
    facts = []
    if summary.get("loss") is not None:
        facts.append(("training loss", f"{summary['loss']:.4f}"))
    if summary.get("eval_loss") is not None:
        perplexity = f" (perplexity {summary['eval_perplexity']:.2f})" if summary["unigram_loss"] is not None else ""
        facts.append(("validation loss", f"{summary['eval_loss']:.4f}{perplexity}"))
        shown = {name: value for name, value in summary.get("metrics", {}).items() if name not in _SHOWN_ELSEWHERE}
        facts += [(name.removeprefix("eval_").replace("_", " "), f"{value:.4f}") for name, value in shown.items()]
        if summary.get("unigram_loss") is not None:
            gain = summary["unigram_loss"] - summary["eval_loss"]
            side = "below" if gain >= 0 else "above"
            facts.append(
                (
                    "unigram baseline",
                    f"{summary['unigram_loss']:.4f} on the same tokens: {abs(gain):.2f} nats {side} it",
                )
            )
    if summary.get("tokens_per_second") is not None:
        facts.append(("throughput", f"{summary['tokens_per_second']:,.0f} tokens/s"))
    for key in ("checkpoint", "export", "tensorboard"):
        if summary.get(key):
            facts.append((key, summary[key]))
    return facts


def _relative(run_directory: RunDirectory) -> str:
    from pathlib import Path

    try:
        return str(run_directory.path.relative_to(Path.cwd()))
    except ValueError:
        return str(run_directory.path)
