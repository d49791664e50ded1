"""A signal that comes while the driver waits for Ray: the run is stopped, and never failed."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CODE = """
import json, os, random, signal, sys, threading, time
import ray
from cluster import cli, launch
from cluster.stopping import SIGNALS, STOPPING, Stopped

ray.init(
    address="local", include_dashboard=False, num_cpus=1, object_store_memory=80 * 2**20,
    _node_ip_address="127.0.0.1", log_to_driver=False,
)

@ray.remote(num_cpus=1)
def hang():
    time.sleep(600)

result, trials, timeouts = hang.remote(), [], json.loads(sys.argv[2])
STOPPING.grace_s = 600.0
random.seed(0)
for trial in range(int(sys.argv[1])):
    seen, began = [], time.monotonic()

    def run():
        with launch.keeping_what_stands(lambda: seen.append(type(sys.exception()).__name__)):
            timer.start()  # here, since on a busy machine the signal may come before start() returns
            while not STOPPING.asked:
                ray.wait([result], timeout=random.choice(timeouts), fetch_local=trial % 2 == 0)
            raise Stopped  # as between two iterations, where the handler's exception was lost in foreign code

    STOPPING.asked = False
    STOPPING.listen()
    number = SIGNALS[trial % len(SIGNALS)]
    timer = threading.Timer(random.uniform(0.01, 0.1), os.kill, (os.getpid(), number))
    code = cli._guarded(run, traceback=False)
    timer.join()
    trials.append([code, *seen])
    print(trial, code, seen, round(time.monotonic() - began, 2), file=sys.stderr, flush=True)
print(json.dumps(trials))
"""


def test_whatever_comes_out_of_a_wait_after_a_signal_is_a_stop() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, "40", "[0.001, 0.02, 0.3]"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    trials = json.loads(done.stdout.splitlines()[-1])
    assert len(trials) == 40
    assert [trial[0] for trial in trials] == [75] * 40, trials
    assert all(len(trial) == 2 for trial in trials), trials  # what stood was committed, once
    assert "error:" not in done.stderr
