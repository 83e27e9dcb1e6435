"""What a person sees of a long conversion."""

from launcher.training.restore import PROGRESS_INTERVAL_S, Progress


def test_a_long_conversion_says_from_time_to_time_how_far_it_is() -> None:
    now, told = 0.0, []
    progress = Progress(1000, told.append, clock=lambda: now)
    for _ in range(10):
        now += PROGRESS_INTERVAL_S / 4
        progress.add(100)
    assert told == ["converting: 40% after 10 s", "converting: 80% after 20 s"]


def test_a_short_one_says_nothing_on_the_way() -> None:
    told: list[str] = []
    Progress(1000, told.append, clock=lambda: 0.0).add(1000)
    assert told == []
