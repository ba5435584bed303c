"""Several processes train one network as one process would; they stop, fail and go on together. Two gloo processes on the CPU."""
from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT
from safetensors.torch import load_file

from qtseg.training import config as training_config, distributed as training_distributed, loop
from qtseg.training.augmentation import Augmentation
from qtseg.training.operations import OPERATIONS
from qtseg.files.yaml import read_values, read_yaml
from qtseg.cli import main
from qtseg.training.distributed import TeamError, joined_team
from qtseg.network.model import QTSeg
from qtseg.training.callbacks import EMA
from qtseg.training.config import TrainConfig
from qtseg.training.loop import fit
from qtseg.training.trainer import Trainer

TWO_PROCESSES = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def tiny(folder: Path, **changes) -> TrainConfig:
    """The configuration of a run of seconds; everything it writes lies in one folder."""
    values = dict(data="phantoms:dermoscopy:32", cache=str(folder / "cache"), size=64, width=4, depths=[1, 1, 1], mlp_width=32, epochs=6, batch=4,
                  valid_batch=8, lr=0.003, operations=["vertical_flip", "horizontal_flip"], device="cpu", runs=str(folder), progress=False)
    return TrainConfig.from_dict(values | changes)


def frozen(folder: Path, name: str, **changes) -> TrainConfig:
    return tiny(folder, name=name, freeze_norm=True, **changes)


def set_free(folder: Path, name: str) -> TrainConfig:
    """Its encoder is frozen for an epoch, and has weights that no logit depends on: what DDP must be told, twice."""
    return frozen(folder, name, epochs=2, encoder_weights=str(folder / "encoder"), freeze_epochs=1, bridge="single", decoder="conv", clip=0.5)


def free(folder: Path, name: str) -> TrainConfig:
    return tiny(folder, name=name, epochs=10)  # after six epochs it learns so fast still that last digits decide on the score


def own_parts() -> dict:
    """A network without BatchNorm, a loss, and a moving average."""
    torch.manual_seed(0)
    return {"model": torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 2, 1)),
            "loss": torch.nn.CrossEntropyLoss(), "callbacks": [EMA(0.9)]}


# What the two processes do. They go through everything in one session, since starting them takes seconds; then each writes what it saw.

def attempt(work) -> dict:
    """What became of a piece of work: history and scores of a run, or an error's name and words."""
    try:
        result = work()
        return {"history": result.history, "metrics": result.metrics}
    except (Exception, KeyboardInterrupt) as error:
        return {"error": type(error).__name__, "said": str(error)}


def disturbed(team, config: TrainConfig, disturb) -> dict:
    """A run in which process 1 alone is disturbed, in the third step of the second epoch."""
    step, taken = Trainer.step, []

    def patched(self, batch):
        loss, counts = step(self, batch)
        taken.append(batch.ids)
        return disturb(loss) if team.rank == 1 and (self.progress.epoch, self.progress.step) == (1, 2) else loss, counts

    Trainer.step = patched
    try:
        return attempt(lambda: fit(config, team=team)) | {"steps": len(taken), "ids": taken[-1]}
    finally:
        Trainer.step = step


def terminated(loss):
    signal.raise_signal(signal.SIGTERM)
    return loss


class Failing:
    """A callback of the leader's that fails."""

    def after_epoch(self, state):
        raise OSError(28, "No space left on device")


def work_of_two(folder: Path) -> None:
    with joined_team("cpu") as team:
        seen = {"frozen": attempt(lambda: fit(frozen(folder, "two"), team=team)),
                "free": attempt(lambda: fit(free(folder, "two_free"), team=team)),
                "set_free": attempt(lambda: fit(set_free(folder, "two_set_free"), team=team)),
                "own": attempt(lambda: fit(tiny(folder, name="two_own", epochs=2), **own_parts(), team=team)),
                "stopped": disturbed(team, frozen(folder, "two_stopped", epochs=2), terminated),
                "resumed": attempt(lambda: fit(frozen(folder, "two_stopped", epochs=2, resume=True), team=team)),
                "nan": disturbed(team, frozen(folder, "two_nan"), lambda loss: loss * float("nan")),
                "leader_failed": attempt(lambda: fit(frozen(folder, "two_failed"), callbacks=[Failing()], team=team)),
                "unequal": attempt(lambda: fit(frozen(folder, "two_unequal", batch=5), team=team)),
                "not_full": attempt(lambda: fit(frozen(folder, "two_not_full", drop_last=False), team=team)),
                "share": team.share(torch.arange(6)).tolist(), "mean": team.mean(torch.tensor([float(team.rank), 4.0])).tolist(),
                "led": team.lead(lambda: f"from {team.rank}"), "odd": attempt(lambda: team.share(torch.arange(5)))}
        (folder / f"process{team.rank}.json").write_text(json.dumps(seen))


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("team")
    torch.manual_seed(0)
    QTSeg(width=4, depths=[1, 1, 1], mlp_width=32).save_pretrained(made / "encoder")
    return made


@pytest.fixture(scope="session")
def two(folder) -> list[dict]:
    """What each of two processes saw."""
    done = subprocess.run([*TWO_PROCESSES, __file__, str(folder)], cwd=ROOT / "tests", env=os.environ | {"OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not done.stdout.strip(), "a run without progress says nothing"
    return [json.loads((folder / f"process{rank}.json").read_text()) for rank in range(2)]


FLIPPED = 100 * 4 / (3 * 64 * 64)  # percent: four pixels of the smallest split, whose logits differ in their last digits


def curve(history: list[dict]) -> list[dict]:
    """The part of a history that does not depend on the clock."""
    return [{key: value for key, value in row.items() if not key.endswith(("seconds", "second", "waited_percent"))} for row in history]


def same_curve(history: list[dict], expected: list[dict], flipped: float) -> None:
    """Losses agree to rounding; hard masks in all but `flipped` percent of the pixels, and their scores accordingly."""
    assert len(history) == len(expected)
    for row, wanted in zip(curve(history), curve(expected)):
        assert row.keys() == wanted.keys()
        for name, value in row.items():
            if name in ("epoch", "lr") or name.endswith("loss"):
                assert value == pytest.approx(wanted[name], abs=1e-4), name
            elif name.endswith(("mae", "acc")):
                assert value == pytest.approx(wanted[name], abs=flipped), name
            else:
                assert value == pytest.approx(wanted[name], abs=50 * flipped), name  # Dice and IoU: shares of fewer pixels


# the same result as one process

@pytest.mark.parametrize("name, config", [("frozen", frozen), ("set_free", set_free)])
def test_with_fixed_statistics_two_processes_reproduce_one(folder, two, name, config):
    alone = fit(config(folder, f"one_{name}"))
    same_curve(two[0][name]["history"], alone.history, FLIPPED)
    scored = [[{"epoch": 0, **metrics[part]} for part in ("valid", "test")] for metrics in (two[0][name]["metrics"], alone.metrics)]
    same_curve(*scored, FLIPPED)
    assert len({row["train_loss"] for row in alone.history}) == len(alone.history)


def test_a_team_trains_what_is_given_as_one_process_does(folder, two):
    alone = fit(tiny(folder, name="one_own", epochs=2), **own_parts())
    same_curve(two[0]["own"]["history"], alone.history, FLIPPED)
    for name, value in load_file(folder / "two_own" / "best_loss" / "model.safetensors").items():
        torch.testing.assert_close(value, load_file(folder / "one_own" / "best_loss" / "model.safetensors")[name], atol=1e-4, rtol=1e-3)


def test_the_run_that_is_reproduced_learns_something(two):
    assert two[0]["frozen"]["metrics"]["valid"]["dice"] > 50


def test_with_free_statistics_two_processes_learn_as_well_as_one(folder, two):
    """So short a run is noisy; `training.distributed` states the differences of longer ones, measured over several seeds."""
    alone = fit(free(folder, "one_free"))
    assert two[0]["free"]["metrics"]["valid"]["dice"] == pytest.approx(alone.metrics["valid"]["dice"], abs=10) and alone.metrics["valid"]["dice"] > 50
    assert curve(two[0]["free"]["history"]) != curve(alone.history), "BatchNorm saw only its share"


def test_both_processes_know_the_same_scores_and_only_the_leader_writes(folder, two):
    assert curve(two[0]["frozen"]["history"]) == curve(two[1]["frozen"]["history"])
    assert two[0]["frozen"]["metrics"] == two[1]["frozen"]["metrics"]
    assert two[0]["frozen"]["metrics"]["train"]["processes"] == 2
    assert json.loads((folder / "two" / "metrics.json").read_text()) == two[0]["frozen"]["metrics"]
    assert {path.name for path in (folder / "two").iterdir()} == {"config.json", "splits.json", "history.csv", "metrics.json", "resume.pt", "last",
                                                                  *(f"best_{name}" for name in training_config.BEST)}


def test_a_checkpoint_of_a_team_opens_like_any_other(folder, two):
    assert QTSeg.from_pretrained(folder / "two" / "best_dice").config["width"] == 4


# stopping and failing together

def test_a_signal_to_one_process_stops_both_after_the_same_step_and_the_run_goes_on_to_the_same_result(two):
    for seen in two:
        assert seen["stopped"]["error"] == "KeyboardInterrupt" and "stopped in epoch 2 after step 3" in seen["stopped"]["said"]
        assert seen["stopped"]["steps"] == two[0]["stopped"]["steps"]
        assert curve(seen["resumed"]["history"]) == curve(two[0]["frozen"]["history"])[:2], "to the last bit"


def test_a_loss_that_is_not_finite_on_one_process_stops_both(two):
    for seen in two:
        assert seen["nan"]["error"] == "FloatingPointError" and seen["nan"]["said"] == two[0]["nan"]["said"]
    assert "the loss became nan in epoch 2 on the images" in two[0]["nan"]["said"]


def test_what_fails_on_the_leader_ends_all(two):
    assert two[0]["leader_failed"]["error"] == "OSError"
    assert two[1]["leader_failed"] == {"error": "TeamError", "said": "the leading process stopped: OSError: [Errno 28] No space left on device"}


def test_unequal_shares_are_refused_in_one_sentence(folder, two):
    for seen in two:
        assert seen["unequal"] == {"error": "ValueError", "said": "a batch of 5 cannot be shared equally by 2 processes: choose a multiple of 2"}
        assert seen["not_full"]["error"] == "ValueError" and "set drop_last=True" in seen["not_full"]["said"]
        assert seen["odd"] == {"error": "ValueError", "said": "5 rows cannot be shared equally by 2 processes"}
    assert not (folder / "two_unequal").exists()


def test_shares_means_and_the_leaders_word(two):
    assert [seen["share"] for seen in two] == [[0, 1, 2], [3, 4, 5]]
    assert [seen["mean"] for seen in two] == [[0.5, 4.0]] * 2 and [seen["led"] for seen in two] == ["from 0"] * 2


# joining

def test_a_process_that_torchrun_did_not_start_is_told_how(monkeypatch):
    for name in training_distributed.STARTED_BY_TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(TeamError, match="RANK, .* not set.*torchrun"), joined_team("cpu"):
        pass


@pytest.fixture
def as_if_by_torchrun(monkeypatch):
    """The variables of the only process of a team; the port is one that is taken."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        values = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
                  "MASTER_PORT": str(taken.getsockname()[1])}
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        yield


def test_a_port_that_is_taken_is_one_sentence(as_if_by_torchrun):
    with pytest.raises(TeamError, match="could not meet at 127.0.0.1:.* the port is taken: .*--standalone"), joined_team("cpu"):
        pass
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("device", ["cuda:0", "mps"])
def test_a_team_computes_on_cpus_or_on_a_gpu_for_each_process(as_if_by_torchrun, monkeypatch, device):
    monkeypatch.setattr(training_distributed, "choose_device", torch.device)
    with pytest.raises(ValueError, match=f"one GPU for each process, not on {device}"), joined_team(device):
        pass


def test_more_processes_than_gpus_are_refused(as_if_by_torchrun, monkeypatch):
    monkeypatch.setattr(training_distributed, "choose_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="4 processes on this machine have 2 GPUs: start at most one for each, --nproc-per-node 2"), joined_team("cuda"):
        pass


# what happens on GPUs only, as far as a CPU can tell

def test_synchronized_batchnorm_keeps_parameters_state_and_activations():
    from qtseg.network.baselines import Baseline

    for model in (QTSeg(width=4, depths=[1, 1, 1], mlp_width=32), Baseline("unet", "tu-efficientnet_lite0")):
        parameters, state = list(model.parameters()), {name: value.clone() for name, value in model.state_dict().items()}
        image = torch.rand(1, 3, 64, 64)
        with torch.no_grad():
            before = model.eval()(image)
            after = training_distributed._synchronized(model).eval()(image)
        assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in model.modules())
        assert not any(type(module) is torch.nn.BatchNorm2d for module in model.modules())
        assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items()) and torch.equal(before, after)


# the command

def test_parameters_come_from_a_file_and_changes_win(tmp_path):
    (tmp_path / "p.yaml").write_text("lr: 0.01\nepochs: 3\ndepths: [1, 1, 1]\n")
    config = TrainConfig.from_dict(read_values([str(tmp_path / "p.yaml"), "epochs=5", "fold=null", "lr=1e-4", "name=mine"]))
    assert (config.lr, config.epochs, config.depths, config.fold, config.name) == (1e-4, 5, [1, 1, 1], None, "mine")
    assert read_values([]) == {} and read_values(["data=a=b.zip"]) == {"data": "a=b.zip"}


@pytest.mark.parametrize("text, changes, said", [
    ("lr: [1", [], "p.yaml is not YAML"), ("- 1\n- 2", [], "holds no mapping"), ("epoch: 3", [], "unknown configuration keys: epoch"),
    ("lr: 0.1", ["epochs"], "epochs is no key=value: only the first word may be a YAML file"), ("lr: 0.1", ["lr=[1"], "lr=[1 is not YAML"),
    ("lr: 0.1", ["lr=fast"], "lr is a number > 0, not 'fast'"), ("lr: 1\nlr: 2", [], "p.yaml says twice: lr"), ("lr: [" * 5000, [], "p.yaml is not YAML"),
    ("[" * 5000, [], "nested too deep"), ("a: &a [1]\n" + "".join(f"b{n}: &b{n} [{', '.join(['*' + ('a' if n == 0 else f'b{n - 1}')] * 9)}]\n" for n in range(30)), [],
                                          "its aliases stand for more than 100,000 values"),
    ("a: &a {b: 1}\n" + "".join(f"m{n}: &m{n} {{<<: [*{'a' if n == 0 else f'm{n - 1}'}, *{'a' if n == 0 else f'm{n - 1}'}]}}\n" for n in range(40)), [], "aliases stand for"),
    ("depths: &a [*a]", [], "an alias names something that it lies in"), ("lr: \x1b", [], "p.yaml is not YAML"), ("epochs: " + "9" * 5000, [], "p.yaml is not YAML"),
    ("x" * 2**19, [], "QTSEG_MAX_YAML_BYTES"), ("name: ..", [], "name is the name of one folder"),
], ids=range(16))
def test_parameters_that_cannot_be_used_are_one_sentence(tmp_path, capsys, monkeypatch, text, changes, said):
    monkeypatch.setattr(loop, "fit", lambda *_, **__: pytest.fail("it trained"))
    (tmp_path / "p.yaml").write_text(text)
    assert main(["train", str(tmp_path / "p.yaml"), *changes]) == 1
    printed = capsys.readouterr()
    assert said in printed.err and len(printed.err.strip().splitlines()) == 1 and not printed.out


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_given_as_parameters_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "p.yaml")
    for path in (tmp_path / "p.yaml", "/dev/zero", tmp_path):
        with pytest.raises(ValueError, match="is no text that can be read .is a (pipe|device|folder), not a file"):
            read_yaml(path)


def test_a_process_augments_its_share_alone_as_it_is_in_the_whole_batch(tmp_path, monkeypatch):
    """What two processes make of their halves is what one makes of the whole."""
    class Half:
        size = 2

        def __init__(self, rank):
            self.rank, self.leads = rank, rank == 0

        def wrap(self, model, shape):
            return model

        def share(self, batch):
            return batch[self.rank * len(batch) // 2 :][: len(batch) // 2]

    config, seen = tiny(tmp_path, name="shares", operations=list(OPERATIONS), most_operations=6), []
    augment = Augmentation.__call__
    monkeypatch.setattr(Augmentation, "__call__", lambda self, *given: seen.append(augment(self, *given)) or seen[-1])
    data = loop.open_data(config)
    for team in (None, Half(0), Half(1)):
        trainer = Trainer(config, data, team=team)
        trainer.step(next(trainer.begin_epoch()))
    whole, *halves = seen
    assert [len(images) for images, _ in seen] == [4, 2, 2]
    assert all(torch.equal(torch.cat(parts), part) for part, *parts in zip(whole, *halves))


def test_the_command_trains_and_is_stopped_by_one_signal(tmp_path):
    parameters = tmp_path / "p.yaml"
    parameters.write_text(yaml.safe_dump(tiny(tmp_path, name="command", epochs=2000, progress=True, resume=True).to_dict()))
    command = [*TWO_PROCESSES, "--module", "qtseg.cli", "train", str(parameters)]
    process = subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    before = []
    for line in process.stdout:
        before.append(line)
        if line.startswith("epoch   1"):
            break
    else:
        raise AssertionError("".join(before))
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=300)[0]
    assert process.returncode != 0 and said.count("run again with resume=True to go on from there") == 1, said
    stopped = torch.load(tmp_path / "command" / "resume.pt", weights_only=True)["progress"]
    assert f"stopped in epoch {stopped['epoch'] + 1} after step {stopped['step']}" in said


if __name__ == "__main__":
    torch.set_num_threads(1)
    work_of_two(Path(sys.argv[1]))
    os._exit(0)  # all is written. Under load, 1 of 12 processes was aborted late ("terminate called without an active exception")
