"""The faults of tests/integration/test_faults.py: what happens, when, and what has to come of it.

`fault` and `outcome` are the table in docs/evaluation.md, word for word; the other fields are what the test does and
holds the run to.
"""

from __future__ import annotations

import dataclasses

STEPS = 4
EVERY_STEP = tuple(range(STEPS + 1))  # the untrained model, then after each step


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One run with one fault.

    `at` is the point where everything waits while `acts` are done: step.N (before the N-th step, from 0), publish.N
    (half-way through writing a snapshot), and the fake engine's start.N, load.N, generate.N.  An act is a signal and
    whom it hits ("KILL api core"), or a function of faults.py.  `spoil` are done in the trainer before it starts.
    `ended` is "trained" (all steps, exit code 0), a signal's name, or an exit code; `scored` the steps with scores;
    `says` regular expressions for the trainer's output.
    """

    name: str
    fault: str
    outcome: str
    at: str = ""
    acts: tuple[str, ...] = ()
    release: bool = True
    spoil: tuple[str, ...] = ()
    control: tuple[str, ...] = ()
    adapter: bool = False
    ranks: int = 1
    timeout_s: float = 20.0
    ended: str | int = "trained"
    scored: tuple[int, ...] = EVERY_STEP
    says: tuple[str, ...] = ()


GONE = "the run is dead; its engine ends with it"
NEXT = "that evaluation is skipped; the next one has a new engine"
SAME = "a new engine answers in the same evaluation"

FAULTS = (
    # -- the trainer dies
    Fault(name="trainer-killed-at-start", fault="kill -9 of the trainer while vLLM starts", outcome=GONE,
          at="start.0", acts=("KILL trainer",), ended="SIGKILL", scored=()),
    Fault(name="trainer-killed-idle", fault="kill -9 of the trainer while vLLM is idle", outcome=GONE,
          at="step.2", acts=("KILL trainer",), ended="SIGKILL", scored=(0, 1, 2)),
    Fault(name="trainer-killed-generating", fault="kill -9 of the trainer while vLLM answers", outcome=GONE,
          at="generate.1", acts=("KILL trainer",), ended="SIGKILL", scored=(0,)),
    Fault(name="trainer-killed-publishing", fault="kill -9 of the trainer while it writes a snapshot",
          outcome=f"{GONE}; the half-written folder is hidden, and removed by the next run there or by "
          "`hf-dsvllm doctor --reap`",
          at="publish.1", acts=("KILL trainer", "trainer_ended", "reap_leftovers"), ended="SIGKILL", scored=(0, 1)),
    Fault(name="trainer-terminated", fault="SIGTERM to the trainer while vLLM answers", outcome=GONE,
          at="generate.2", acts=("TERM trainer",), release=False, ended="SIGTERM", scored=(0, 1)),
    Fault(name="trainer-interrupted", fault="Ctrl-C while vLLM answers",
          outcome="the run ends at once with exit code 130, and its engine with it",
          at="generate.2", acts=("INT trainer",), release=False, ended=130, scored=(0, 1), timeout_s=300,
          says=("interrupted",)),
    Fault(name="rank-0-killed", fault="kill -9 of rank 0 of two while vLLM answers",
          outcome="both ranks are dead; the engine ends with rank 0", ranks=2,
          at="generate.1", acts=("KILL trainer",), ended="SIGKILL", scored=(0,)),
    Fault(name="rank-1-killed", fault="kill -9 of rank 1 of two in a step",
          outcome="rank 0 fails at the next exchange, and its engine ends with it", ranks=2,
          at="step.1", acts=("KILL rank1",), ended=1, scored=(0, 1)),
    # -- the engine dies
    Fault(name="api-killed-at-start", fault="kill -9 of vLLM's API server while it starts", outcome=SAME,
          at="start.0", acts=("KILL api",)),
    Fault(name="core-killed-at-start", fault="kill -9 of EngineCore while it starts", outcome=SAME,
          at="start.0", acts=("KILL core",)),
    Fault(name="api-killed-idle", fault="kill -9 of the API server between two evaluations", outcome=SAME,
          at="step.1", acts=("KILL api",)),
    Fault(name="core-killed-idle", fault="kill -9 of EngineCore between two evaluations", outcome=SAME,
          at="step.1", acts=("KILL core",)),
    Fault(name="worker-killed-idle", fault="kill -9 of a worker between two evaluations", outcome=SAME,
          at="step.1", acts=("KILL worker",)),
    Fault(name="supervisor-killed-idle", fault="kill -9 of the supervisor between two evaluations", outcome=SAME,
          at="step.1", acts=("KILL supervisor",)),
    Fault(name="supervisor-and-api-killed", fault="kill -9 of supervisor and API server together while vLLM answers",
          outcome=f"{NEXT}; EngineCore, which neither would have seen, is ended by the supervisor's guard",
          at="generate.1", acts=("KILL supervisor api",), scored=(0, 2, 3, 4), says=("step 1: .*is skipped",)),
    Fault(name="api-killed-generating", fault="kill -9 of the API server while it answers", outcome=NEXT,
          at="generate.1", acts=("KILL api",), scored=(0, 2, 3, 4), says=("step 1: .*is skipped",)),
    Fault(name="core-killed-generating", fault="kill -9 of EngineCore while it answers", outcome=NEXT,
          at="generate.1", acts=("KILL core",), scored=(0, 2, 3, 4), says=("step 1: .*is skipped",)),
    Fault(name="core-killed-loading", fault="kill -9 of EngineCore while weights are reloaded",
          outcome="a new engine starts from the snapshot in the same evaluation", at="load.0", acts=("KILL core",)),
    Fault(name="core-killed-loading-adapter", fault="kill -9 of EngineCore while an adapter is loaded", outcome=SAME,
          adapter=True, at="load.0", acts=("KILL core",)),
    Fault(name="engine-stopped", fault="SIGSTOP of the whole engine while it answers",
          outcome="that evaluation ends at its deadline and is skipped; the stopped engine is ended, and a new one "
          "answers the next",
          at="generate.1", acts=("STOP api core worker",), release=False, timeout_s=4.0, scored=(0, 2, 3, 4),
          says=("step 1: .*had no answer within",)),
    Fault(name="never-healthy", fault="a /health that never answers",
          outcome="each evaluation is skipped at its deadline; after three evaluation is given up, training goes on",
          control=("deaf",), timeout_s=1.5, scored=(), says=("not ready after", "giving up on it")),
    # -- vLLM that cannot start
    Fault(name="vllm-missing", fault="vLLM is not installed",
          outcome="an error with the line to install it, before the model is loaded",
          spoil=("without_vllm",), ended=2, scored=(), says=("pip install",)),
    Fault(name="bad-vllm-args", fault="--vllm_args that vLLM does not know",
          outcome="vLLM's own words and the fix; given up after three evaluations, training goes on",
          control=("bad-arguments",), scored=(),
          says=("unrecognized arguments: --nonsense", "giving up on it")),
    Fault(name="out-of-memory", fault="vLLM finds too little memory for its cache",
          outcome="vLLM's own words and the fix; given up after three evaluations, training goes on",
          control=("out-of-memory",), scored=(), says=("too little memory", "giving up on it")),
    Fault(name="memory-comes-back", fault="vLLM finds too little memory, later there is enough",
          outcome="evaluations are skipped until vLLM starts", control=("out-of-memory",),
          at="step.1", acts=("free_memory",), scored=(2, 3, 4), says=("step 0: .*is skipped",)),
    # -- files
    Fault(name="snapshot-corrupted", fault="a snapshot cut short between writing and loading",
          outcome="that evaluation is skipped; the next snapshot is evaluated by a new engine",
          spoil=("cut_snapshot_2",), scored=(0, 1, 3, 4), says=("step 2: .*is skipped",)),
    Fault(name="adapter-corrupted", fault="an adapter cut short between writing and loading",
          outcome="vLLM refuses it; that evaluation is skipped, the next adapter is evaluated",
          adapter=True, spoil=("cut_snapshot_2",), scored=(0, 1, 3, 4), says=("step 2: .*is skipped",)),
    Fault(name="disk-full", fault="the disk is full, and later it is not",
          outcome="evaluations without a snapshot are skipped, and no half file is left; then scores come again",
          spoil=("small_disk",), at="step.1", acts=("fill_disk", "go_on_until step.3", "free_disk"),
          scored=(0, 1, 4), says=("step 2: .*is skipped", "step 3: .*is skipped")),
    Fault(name="run-folder-deleted", fault="the run folder is deleted in the middle",
          outcome="it is made again; later evaluations are in it", at="step.2", acts=("delete_run_folder",),
          scored=(3, 4)),
    Fault(name="two-runs", fault="a second run in the same output folder",
          outcome="it is refused with the number of the process that has the folder; the first goes on undisturbed",
          at="step.1", acts=("second_run",)),
    Fault(name="sockets-deleted", fault="the folder of sockets is deleted (a cleaner of temporary files)",
          outcome=SAME, at="step.1", acts=("delete_sockets",)),
    Fault(name="no-folder-for-sockets", fault="no temporary folder can be written",
          outcome="an error that names the folders tried, before the model is loaded",
          spoil=("unwritable_temporary_folders",), ended=2, scored=(), says=("no folder for vLLM's sockets",)),
    # -- the evaluation itself
    Fault(name="file-broken-before", fault="the evaluation file is broken when the run starts",
          outcome="an error with line and reason, before the model is loaded", spoil=("break_file",), ended=2,
          scored=(), says=("line 2",)),
    Fault(name="file-broken-after", fault="the evaluation file is broken in the middle of the run",
          outcome="nothing changes: it was read before the first step", at="step.1", acts=("break_file",)),
    Fault(name="metric-raises", fault="a metric of your own that raises",
          outcome="each evaluation is skipped and names the sample; given up after three, training goes on",
          spoil=("raising_metric",), scored=(), says=("sample", "giving up on it")),
    Fault(name="judge-hangs", fault="a judge that takes connections and never replies",
          outcome="its scores are left out and counted; the other metrics are scored",
          spoil=("hanging_judge",), says=("judge",)),
)  # fmt: skip
