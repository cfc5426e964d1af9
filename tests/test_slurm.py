"The graph through SLURM's executor and the shipped profile; a stand-in for SLURM's commands runs what is submitted."
import json
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import yaml

from aladin.files import InputError, RunFailed, resource_dir
from aladin.runs.graph import run_results

RUN = "alad-alignment-triplet/seed-1"
PROFILE = resource_dir("experiments")/"profiles"/"slurm"
STUDY = dict(size="tiny", seed=1, configurations=("alad-alignment-triplet",))
COMMANDS = ("sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo", "sacct")

# Each job is a folder, named by its number, with the words of its sbatch, its process and in the end its state.
STANDIN = '''import json, os, signal, subprocess, sys, time
from pathlib import Path
queue, name, words = Path(__file__).parent.parent/"queue", Path(sys.argv[0]).name, sys.argv[1:]
def state(job): return (job/"state").read_text() if (job/"state").exists() else "RUNNING"
def states(): return {job.name: state(job) for job in sorted(queue.iterdir())}
def end(job, state):
    (queue/job/"new").write_text(state)
    os.replace(queue/job/"new", queue/job/"state")
if name == "sbatch":
    value = {}
    for word, following in zip(words, words[1:] + [""]):
        option, equals, given = word.partition("=")
        if word[0] == "-": value[option] = given if equals else following
    number = 1
    while True:
        try: (queue/str(number)).mkdir()
        except FileExistsError: number += 1
        else: break
    (queue/str(number)/"words").write_text(json.dumps(value))
    if os.fork() == 0:
        os.setsid()
        with open(value["--output"].replace("%j", str(number)), "w") as out:
            job = subprocess.Popen(["sh", "-c", value["--wrap"]], stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                                   cwd=value["-D"], env=os.environ | dict(SLURM_JOB_ID=str(number)),
                                   start_new_session=True)
            for stream in (1, 2): os.dup2(out.fileno(), stream) # the plugin waits for their end
            (queue/str(number)/"process").write_text(str(job.pid))
            status = job.wait()
        if states().get(str(number)) == "RUNNING": end(str(number), "FAILED" if status else "COMPLETED")
        os._exit(0)
    print(number)
elif name == "srun":
    while words[0][0] == "-": words.pop(0)
    os.execvp(words[0], words)
elif name == "squeue": # answers when a job ends, so that nobody waits for the next question; at once when asked so
    before, until = states(), time.time()+(0 if "AT_ONCE" in os.environ else 20)
    while "RUNNING" in before.values() and states() == before and time.time() < until: time.sleep(0.1)
    for job, found in states().items(): print(f"{job}|{found}")
elif name == "scancel":
    for job in words:
        end(job, "CANCELLED")
        os.killpg(int((queue/job/"process").read_text()), signal.SIGKILL)
elif name == "scontrol": print("MinJobAge = 300 sec")
elif name == "sinfo": print("PARTITION\\nsmall*")
else: sys.exit("accounting storage is disabled")
'''


class Slurm:
    def __init__(self, folder):
        (folder/"bin").mkdir()
        self.queue = folder/"queue"
        self.queue.mkdir()
        for name in COMMANDS:
            (folder/"bin"/name).write_text(f"#!{sys.executable} -SE\n{STANDIN}")
            (folder/"bin"/name).chmod(0o755)

    def jobs(self):
        return [json.loads((self.queue/str(n+1)/"words").read_text()) for n in range(len(list(self.queue.iterdir())))]

    def stages(self): return [j["--comment"].split("_")[1] for j in self.jobs()]

    def states(self): return {p.parent.name: p.read_text() for p in self.queue.glob("*/state")}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path/'bin'}{os.pathsep}{os.environ['PATH']}")
    return Slurm(tmp_path)


@pytest.fixture
def profile(tmp_path):
    "The shipped one, asking earlier."
    (tmp_path/"profile").mkdir()
    (tmp_path/"profile"/"config.yaml").write_text(
        yaml.safe_dump(yaml.safe_load((PROFILE/"config.yaml").read_text())
                       | {"slurm-init-seconds-before-status-checks": 1, "latency-wait": 5}))
    return str(tmp_path/"profile")


def wait_for(what, seconds=180):
    until = time.time()+seconds
    while not what():
        assert time.time() < until
        time.sleep(0.2)


def test_the_same_graph_goes_through_slurm(slurm, profile, tmp_path):
    "A failed job, a killed coordinator whose jobs are cancelled, then the whole."
    out, folder = tmp_path/"results", tmp_path/"results"/"scenes-tiny"
    broken = yaml.safe_load((resource_dir("experiments")/"settings"/"tiny.yaml").read_text())
    broken["all"]["training"]["lr"] = 1e19
    (tmp_path/"broken.yaml").write_text(yaml.safe_dump(broken))
    with pytest.raises(RunFailed, match=f"{RUN}/train.failed.ipynb"):
        run_results(out, profile=profile, say=lambda line: None, settings=str(tmp_path/"broken.yaml"), **STUDY)
    assert (slurm.stages() == ["prepare", "pretrain", "train"]
            and slurm.states() == {"1": "COMPLETED", "2": "COMPLETED", "3": "FAILED"})
    assert "FloatingPointError" in next((folder/".snakemake"/"slurm_logs").rglob("3.log")).read_text()

    code = f"from aladin.runs.graph import run_results; run_results({str(out)!r}, profile={profile!r}, **{STUDY!r})"
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | dict(AT_ONCE="1"),
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: list(folder.rglob(".train.*.part")))
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: slurm.states().get("4") == "CANCELLED" and not list((folder/".snakemake"/"locks").glob("*")))
    assert not (folder/RUN/"training.json").exists()

    table = run_results(out, profile=profile, say=lambda line: None, **STUDY)
    assert (len(table) == 1 and len(pd.read_csv(folder/"table.csv")) == 1
            and json.loads((folder/RUN/"metrics.json").read_text())["seed"] == 1)
    assert slurm.stages() == ["prepare", "pretrain", "train", "train", "train", "evaluate", "attention", "report"]
    assert set(slurm.states().values()) == {"COMPLETED", "FAILED", "CANCELLED"} and len(slurm.states()) == 8
    assert not list(folder.rglob("*.part")) and not list(folder.rglob("*.failed.ipynb"))
    for job in slurm.jobs():
        assert (job["-p"], job["--mem"]) == ("small", "16000")
        # a single pre-training has two threads
        assert job["--cpus-per-task"] == ("2" if "pretrain" in job["--comment"] else "1")
        assert job["-t"] == ("2880" if "train" in job["--comment"] else "240")


def test_a_profile_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(InputError, match="nbs/experiments/profiles/slurm"):
        run_results(tmp_path, profile=str(tmp_path/"none"), **STUDY)
