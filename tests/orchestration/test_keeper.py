"""The bound of a node's keeper: what would not leave its node a reserve of memory is refused, and nothing is spoilt."""

from launcher.orchestration.keeper import Keeper
from tests.checkpoints.conftest import manifest_of

MANIFEST = manifest_of(5).model_dump_json()


def test_what_does_not_fit_is_refused_and_what_fits_is_kept() -> None:
    keeper = Keeper()
    refused = keeper.make_room("big", 5, 0, 2**50, {"w": (0, 2**50)}, MANIFEST, None)
    assert refused is not None
    assert "GiB of memory free, too little for 1048576.00 GiB more" in refused
    assert all(kept.token != "big" or not kept.parts for kept in keeper.inventory())
    assert keeper.make_room("small", 10, 0, 7, {"w": (0, 7)}, MANIFEST, None) is None
    keeper.write("small", 0, 0, b"weights")
    part = keeper._shelf.parts["small"][0]
    assert keeper.seal("small", 0, {"w": part.hashed("w")}) is None
    assert keeper.piece("small", 0, "w", 0) == b"weights"
