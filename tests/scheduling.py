"""Which tests run on which worker of pytest-xdist, and in what order."""

from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

SHARED = ("brief", "locked", "stock")  # servers of a few tests each, which stand in several files
# Files, and single tests of other files, that go to the worker of a file with which they share one of these servers.
TOGETHER = {
    "test_web_server": "test_web_page",
    "test_serve": "test_web_page",
    "test_faults": "test_protocol",
    "test_speed": "test_deploy",
    "test_key_and_subprotocols": "test_protocol",
    "test_busy_and_idle": "test_web_page",
    "test_engine_out_of_memory": "test_protocol",
}
# What takes longest begins first: what is left for the end should be short.
LONGEST = [
    f"test_{name}"
    for name in "web_page microphone protocol deploy openai clients benchmark web_faults recipe sdks realtime "
    "guard plugin outputs writing".split()
]


def group(nodeid: str) -> str:
    """Which tests stay on one worker, by test or by file."""
    file, _, test = nodeid.partition("::")
    stem = Path(file).stem
    return TOGETHER.get(test.partition("[")[0]) or TOGETHER.get(stem, stem)


class Groups(LoadScopeScheduling):
    """Of pytest-xdist's own schedulers, loadgroup has no effect with pytest 9.2, whose node ids it cannot change."""

    def _split_scope(self, nodeid: str) -> str:
        return group(nodeid)


def pytest_xdist_make_scheduler(config, log):
    return Groups(config, log) if config.getoption("dist") == "loadscope" else None


def order(item: pytest.Item) -> tuple[int, bool]:
    """The longest groups first."""
    of = group(item.nodeid)
    # test_deploy.py kills `stock` and leaves it so: after test_speed.py nobody needs it any more.
    return (LONGEST.index(of) if of in LONGEST else len(LONGEST)), "test_deploy.py" in item.nodeid
