"""A folder is pushed over HTTP to the Hub of hub.py by the real client, whatever befalls the connection."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import EvalResult, ModelCard

from tests.conftest import DIGITS, environment_without_package, tiny
from tests.fake_hub.hub import Fault, Hub
from vit_simple import ViTSimpleForImageClassification, ViTSimpleModel
from vit_simple.files import ROOT
from vit_simple.sharing.card import BEGIN, END, build_card, interval, user_text
from vit_simple.sharing.upload import push as push_here
from vit_simple.sharing.upload import verify_commit
from vit_simple.sharing.verify import check, fresh_outputs, refuse_secrets

TOKEN = "hf_plantedplantedplantedplanted"
NAME = "user/digits"


@pytest.fixture
def hub():
    with Hub({TOKEN: "user"}) as hub:
        yield hub


@pytest.fixture
def folder(run_folder, tmp_path) -> Path:
    """A run's folder, with a licence in its card."""
    folder = Path(shutil.copytree(run_folder, tmp_path / "digits"))
    (folder / "README.md").write_text(build_card(folder, license="mit"))
    return folder


def call(hub: Hub, work: Path, *command, token: str | None = TOKEN) -> subprocess.CompletedProcess:
    """A command in a fresh process that knows no Hub but this one; the token is in nothing that it says."""
    variables = {**hub.environment(work / "home", token), "OMP_NUM_THREADS": "2"}
    result = subprocess.run(
        [sys.executable, *map(str, command)], cwd=work, env=variables, capture_output=True, text=True
    )
    assert TOKEN not in result.stdout + result.stderr
    return result


def push(hub: Hub, work: Path, *arguments, **options) -> subprocess.CompletedProcess:
    return call(hub, work, ROOT / "push_to_hub.py", *arguments, **options)


def head(hub: Hub, revision: str = "main"):
    return hub.repos[f"models/{NAME}"].at(revision)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The Hub, the folder and the output of a run that pushed at a checkpoint and at the end."""
    work = tmp_path_factory.mktemp("trained")
    options = ["--num_train_epochs", "2", "--save_steps", "40", "--output_dir", work / "digits"]
    options += ["--push_to_hub", "--hub_model_id", NAME, "--hub_strategy", "every_save", "--license", "apache-2.0"]
    with Hub({TOKEN: "user"}) as hub:
        result = call(hub, work, ROOT / "train.py", *options, "--hub_private_repo")
        assert result.returncode == 0, result.stderr
        yield hub, work / "digits", result.stdout


def test_train_push_and_load_by_the_line_that_was_printed(trained, tmp_path):
    hub, folder, printed = trained
    commits = head(hub).history()[::-1]
    assert [commit.title for commit in commits] == ["initial commit", "step 40 of digits", "end of digits"]
    assert hub.repos[f"models/{NAME}"].private
    pinned = re.findall(r"^transformers\.(.*)$", printed, flags=re.MULTILINE)
    assert [re.search('revision="(.*?)"', line)[1] for line in pinned] == [commit.sha for commit in commits[1:]]
    for commit in commits[1:]:
        assert not any("checkpoint" in name or name.endswith((".bin", ".pt")) for name in commit.files)
        assert all(TOKEN.encode() not in content for content in commit.files.values())

    python = environment_without_package(tmp_path / "environment")
    code = f"""
import json, torch, transformers
for line in {pinned!r}:
    model = eval("transformers." + line)
    with torch.no_grad():
        print(json.dumps(model(torch.ones(1, 3, 8, 8)).logits.tolist()))
"""
    (tmp_path / "elsewhere").mkdir()
    variables = hub.environment(tmp_path / "elsewhere/home", TOKEN)
    loaded = subprocess.run(
        [python, "-c", code], cwd=tmp_path / "elsewhere", env=variables, capture_output=True, text=True
    )
    assert loaded.returncode == 0, loaded.stderr
    with torch.no_grad():
        here = ViTSimpleForImageClassification.from_pretrained(folder)(torch.ones(1, 3, 8, 8)).logits
    first, last = map(json.loads, loaded.stdout.splitlines()[-2:])
    assert last == here.tolist() and first != last
    card = ModelCard(commits[-1].files["README.md"].decode())
    assert f'model="{NAME}"' in card.text and card.data.license == "apache-2.0"
    said = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    metrics = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert metrics["top-1 accuracy"] == said["top1"] and metrics["loss"] == said["loss"]
    assert f"{said['correct']} of them right" in card.text


SEVERAL_PUSHES = """
import contextlib, io, json, sys
from vit_simple.push_to_hub import main

said = []
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            main(arguments)
        except SystemExit as error:
            print(error)
    said.append(printed.getvalue())
print(json.dumps(said))
"""


def test_a_push_again_does_nothing_and_a_changed_card_goes_to_a_branch_a_tag_and_a_request(trained, tmp_path):
    hub, folder, _ = trained
    before, written = head(hub), (folder / "README.md").read_text()
    again = push(hub, tmp_path, folder, NAME, "--private")
    assert f"nothing to push: {hub.url}/{NAME} has these files already, at {before.sha}" in again.stdout
    assert head(hub).sha == before.sha and (folder / "README.md").read_text() == written

    (folder / "README.md").write_text(written + "\nBy hand.\n")
    branch = ["--revision", "next", "--tag", "v1", "--commit_message", "By hand"]
    pushes = [branch, ["--create_pr"], ["--create_pr"], ["--tag", "v1"]]
    arguments = json.dumps([[str(folder), NAME, *options] for options in pushes])
    result = call(hub, tmp_path, "-c", SEVERAL_PUSHES, arguments)
    assert result.returncode == 0, result.stderr
    _, requested, again, refused = json.loads(result.stdout.splitlines()[-1])
    assert head(hub).sha == before.sha and head(hub, "v1").sha == head(hub, "next").sha
    card = head(hub, "v1").files["README.md"].decode()
    assert head(hub, "v1").title == "By hand" and 'revision="v1"' in card and card.endswith("\nBy hand.\n")
    assert f"{hub.url}/{NAME}/discussions/1" in requested and "nothing to push" in again
    assert head(hub, "refs/pr/1").parent.sha == before.sha and "refs/pr/2" not in hub.repos[f"models/{NAME}"].refs
    assert "--tag: expected a new one, v1 stands at" in refused

    code = f"""
from transformers import AutoModelForImageClassification
for revision in ("main", "next", "v1", "refs/pr/1"):
    AutoModelForImageClassification.from_pretrained("{NAME}", revision=revision, trust_remote_code=True)
    print("opened", revision)
try:
    AutoModelForImageClassification.from_pretrained("{NAME}", token=False, force_download=True, trust_remote_code=True)
except OSError as error:
    print("private:", str(error).splitlines()[0])
"""
    opened = call(hub, tmp_path, "-c", code).stdout
    assert opened.count("opened") == 4 and f"private: {NAME} is not a local folder" in opened


def test_a_dry_run_shows_the_files_and_the_card_and_changes_nothing(folder, capsys):
    (folder / ".env").write_text("SECRET=1")
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "optimizer.bin").write_text("state")
    assert push_here(folder, NAME, dry_run=True) is None
    listing, _, card = capsys.readouterr().out.partition("\n---\n")
    names = {line.split()[-1] for line in listing.splitlines() if line}
    assert names == {path.name for path in folder.iterdir()} - {".env", "checkpoints", "optimizer.bin"}
    assert f'model="{NAME}"' in card and f'model="{NAME}"' not in (folder / "README.md").read_text()


def edit(folder: Path, name: str, change):
    (folder / name).write_text(change((folder / name).read_text()))


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda folder: (folder / "modeling_vit_simple.py").unlink(), "without modeling_vit_simple.py"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "without preprocessor_config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "pos_embed is missing"),
        (lambda folder: os.truncate(folder / "model.safetensors", 5000), "model.safetensors: expected a whole file"),
        (lambda folder: edit(folder, "config.json", lambda text: text.replace("AutoModelForIm", "AutoIm")), "auto_map"),
        (
            lambda folder: edit(folder, "config.json", lambda text: text.replace('"0": "0"', '"0": "LABEL_0"')),
            "names of",
        ),
        (lambda folder: edit(folder, "config.json", lambda text: text.replace('": 64', '": 32')), "and not"),
        (lambda folder: edit(folder, "config.json", lambda text: text[:-5]), "config.json: expected JSON"),
        (lambda folder: edit(folder, "README.md", lambda text: text.replace("license: mit\n", "")), "--license"),
        (
            lambda folder: edit(folder, "train_config.yaml", lambda text: text + f"token: {TOKEN}\n"),
            "train_config.yaml: e",
        ),
        (
            lambda folder: edit(folder, "README.md", lambda text: text + "sk-" + "aB3" * 10),
            "README.md: expected no secrets",
        ),
    ],
)
def test_a_folder_that_is_not_fit_to_be_shared_is_refused(folder, monkeypatch, change, reason):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    change(folder)
    with pytest.raises((ValueError, OSError), match=reason):
        push_here(folder, NAME, dry_run=True)


def test_code_that_is_not_the_installed_one_is_said_and_must_give_the_same(folder):
    edit(folder, "modeling_vit_simple.py", lambda text: text + "\n# another comment\n")
    _, notes = check(folder)
    assert notes == ["modeling_vit_simple.py is not the installed one; the checkpoint keeps its own"]
    edit(folder, "modeling_vit_simple.py", lambda text: text.replace("** -0.5", "** -0.6"))
    with pytest.raises(ValueError, match="its code and the installed package give other logits, scores"):
        push_here(folder, NAME, dry_run=True)
    edit(folder, "modeling_vit_simple.py", lambda text: text.replace("import copy", "import no_such_module"))
    with pytest.raises(ValueError, match=r"does not load in a fresh process: .*no_such_module"):
        fresh_outputs(str(folder))


def test_without_a_token_or_with_a_wrong_one_nothing_is_changed(hub, folder, tmp_path):
    for token, reason in ((None, "Token is required"), ("hf_wrong_wrong_wrong_wrong", "Invalid user token")):
        result = push(hub, tmp_path, folder, NAME, token=token)
        assert result.returncode == 1 and reason in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert not hub.repos
    options = ["--push_to_hub", "--hub_model_id", NAME, "--license", "mit", "--output_dir", tmp_path / "run"]
    result = call(hub, tmp_path, ROOT / "train.py", *options, token=None)
    assert "--push_to_hub needs a login" in result.stderr and not (tmp_path / "run").exists()


UPLOADS = """
import json, sys, threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from huggingface_hub import HfApi
from vit_simple.sharing.upload import NETWORK_ERRORS, upload

api, files = HfApi(), ["README.md", "config.json", "model.safetensors"]

def tried(name, parent, number=1, **options):
    folder = Path(name)
    folder.mkdir(exist_ok=True)
    for file in files:
        (folder / file).write_text(f"{file} {number}")
    try:
        return upload(api, f"user/{name}", folder, files, parent, f"push {number}", **options)
    except (ValueError, RuntimeError, *NETWORK_ERRORS) as error:
        return f"{type(error).__name__}: {error}"
"""
LOST = {"cut": "answer"}
STALE = {"model-00001-of-00002.safetensors": b"stale", "processor_config.json": b"stale"}
FAULTS = {  # what befalls which request, and what comes of it
    "busy": ([("/commit/", {"status": 429, "retry_after": 1})], "pushed"),
    "down": ([("/commit/", {"status": 503, "times": 2})], "pushed"),
    "gone": ([("/commit/", {"status": 503, "times": 99, "retry_after": 1})], "refused"),
    "unsent": ([("/commit/", {"cut": "request"})], "pushed"),
    "halfway": ([("/commit/", {"cut": "upload"})], "pushed"),
    "lost": ([("/commit/", LOST)], "pushed"),
    "lost-twice": ([("/commit/", LOST), (r"/models/user/lost-twice(\?|$)", {"status": 503})], "pushed"),
    "half-answer": ([("/commit/", {"cut": "download"})], "pushed"),
    "slow": ([("/commit/", {"delay": 2})], "pushed"),
    "storage": ([("/storage/", {"cut": "upload", "method": "PUT"})], "pushed"),
    "no-storage": ([("/no-storage.git/", {"status": 400, "times": 99})], "refused"),
    "forbidden": ([("/commit/", {"status": 403})], "refused"),
    "lost-request": ([("/commit/", LOST)], "requested"),
    "overtaken": ([], "stale"),
}


def test_every_fault_ends_in_one_commit_or_in_an_error_with_the_hub_as_it_was(hub, tmp_path):
    parents = {}
    for name, (faults, end) in FAULTS.items():
        repo = hub.create(f"models/user/{name}", dict(STALE, **{"NOTES.md": b"theirs"}))
        parents[name] = repo.at("main").sha
        if end == "stale":
            repo.add("refs/heads/main", {**repo.at("main").files, "config.json": b"theirs"}, "theirs")
        for path, fault in faults:
            where = f"{name}.*{path}" if path == "/commit/" else path
            hub.faults.append(Fault(where, **fault))
    code = f"""
parents, requests = {parents!r}, {[name for name in FAULTS if FAULTS[name][1] == "requested"]!r}
with ThreadPoolExecutor(len(parents)) as pool:
    ends = pool.map(lambda name: tried(name, parents[name], create_pr=name in requests), parents)
    print(json.dumps(dict(zip(parents, ends))))
"""
    result = call(hub, tmp_path, "-c", UPLOADS + code)
    assert result.returncode == 0, result.stderr
    ends = json.loads(result.stdout.splitlines()[-1])
    files = {f"{name}": f"{name} 1".encode() for name in ("README.md", "config.json", "model.safetensors")}
    for name, (_, end) in FAULTS.items():
        repo = hub.repos[f"models/user/{name}"]
        made = repo.at("refs/pr/1" if end == "requested" else "main")
        if end in ("pushed", "requested"):
            assert made.sha == ends[name] and made.parent.sha == parents[name], ends[name]
            assert {path: made.files[path] for path in files} == files
            assert "NOTES.md" in made.files and not STALE.keys() & made.files.keys()
            assert "refs/pr/2" not in repo.refs
        else:
            assert made.parent is None or end == "stale" or made.sha == parents[name]
            assert "Error: " in ends[name] and (end != "stale" or f"got {made.sha}: look at it" in ends[name])
        if end == "requested":
            assert repo.at("main").sha == parents[name]


def test_pushes_under_random_faults_leave_no_broken_head(hub, tmp_path, request):
    pushes = request.config.getoption("--pushes")
    repo = hub.create("models/user/random")
    hub.disturb(0.1, seed=1)
    code = f"""
ends = []
for number in range(1, 1 + {pushes}):
    try:
        parent = api.repo_info("user/random").sha
    except NETWORK_ERRORS:
        continue
    ends.append((number, tried("random", parent, number)))
print(json.dumps(ends))
"""
    result = call(hub, tmp_path, "-c", UPLOADS + code)
    assert result.returncode == 0, result.stderr
    commits = {commit.sha: commit for commit in repo.at("main").history() if commit.parent}
    ends = json.loads(result.stdout.splitlines()[-1])
    pushed = {sha: number for number, sha in ends if sha in commits}
    assert len(ends) > pushes / 2 and len(pushed) > len(ends) / 2
    numbers = [commit.title.split()[-1] for commit in commits.values()]
    assert len(set(numbers)) == len(numbers)  # no push made two commits
    for sha, commit in commits.items():
        number = commit.title.split()[-1]
        assert pushed.get(sha, int(number)) == int(number)
        for name in ("README.md", "config.json", "model.safetensors"):
            assert commit.files[name] == f"{name} {number}".encode()
    assert all("Error: " in end for _, end in ends if end not in commits)
    assert not any(TOKEN in json.dumps(asked.headers) for asked in hub.log if "/storage/" in asked.path)


TRAINER = """
import sys, torch, transformers
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments

folder = sys.argv[1]
model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained(folder)
rows = [{"pixel_values": torch.randn(3, 8, 8), "labels": number % 10} for number in range(32)]
arguments = TrainingArguments(
    "trained", max_steps=4, save_steps=2, hub_strategy="every_save", push_to_hub=True, hub_model_id="user/trained",
    hub_always_push=True, report_to="none", disable_tqdm=True, use_cpu=True,
)
trainer = Trainer(model, arguments, train_dataset=rows, processing_class=processor)
trainer.save_model()  # the code is there before the first push
trainer.train()
trainer.push_to_hub()
"""


def test_every_push_of_a_trainer_loads_in_one_line(hub, run_folder, tmp_path):
    result = call(hub, tmp_path, "-c", TRAINER, run_folder)
    assert result.returncode == 0, result.stderr
    commits = [commit for commit in hub.repos["models/user/trained"].at("main").history() if commit.parent]
    assert len({commit.files.get("model.safetensors") for commit in commits}) >= 3
    code = f"""
from transformers import pipeline
for sha in {[commit.sha for commit in commits]!r}:
    answers = pipeline("image-classification", "user/trained", revision=sha, trust_remote_code=True)
    print(sha, type(answers.model).__module__)
"""
    loaded = call(hub, tmp_path, "-c", code)
    assert loaded.stdout.count("transformers_modules") == len(commits), loaded.stderr


def test_a_data_set_of_the_hub_is_trained_on_whole_and_as_a_stream(hub, tmp_path):
    files = {}
    for split in ("train", "test"):
        (path,) = Path(DIGITS).glob(f"{split}*.parquet")
        files[f"data/{path.name}"] = path.read_bytes()
    commit = hub.create("datasets/user/digits", files).at("main")
    code = """
import sys
from vit_simple.train import main
common = ["--dataset_name", "user/digits", "--variant", "Ti/4", "--image_size", "8", "--max_steps", "2"]
main([*common, "--output_dir", "whole"])
main([*common, "--output_dir", "stream", "--streaming", "--license", "mit"])
"""
    result = call(hub, tmp_path, "-c", code)
    assert result.returncode == 0, result.stderr
    for name in ("whole", "stream"):
        card = ModelCard.load(tmp_path / name / "README.md")
        assert card.data.datasets == ["user/digits"] and f"revision `{commit.sha}`" in card.text
        assert (
            card.data.eval_results[0].dataset_revision == commit.sha
            and "On 360 test images of user/digits" in card.text
        )


def test_what_stands_beside_the_generated_part_of_a_card_is_kept(folder):
    first = (folder / "README.md").read_text()
    assert build_card(folder) == first and first.count(BEGIN) == first.count(END) == 1
    mine = (
        first.replace("license: mit\n", "license: mit\nlanguage: ja\n").replace(BEGIN, f"# Mine\n\n{BEGIN}")
        + "\nMine, too.\n"
    )
    mine = mine.replace("Vision Transformer trained", "Vision Transformer of mine, trained")
    (folder / "README.md").write_text(mine)
    again = build_card(folder, "user/digits", license="apache-2.0")
    card = ModelCard(again)
    assert card.data.license == "apache-2.0" and card.data.language == "ja"
    assert card.text.strip().startswith("# Mine") and card.text.strip().endswith("Mine, too.")
    assert "of mine, trained" not in again and 'model="user/digits"' in again
    (folder / "README.md").write_text("---\nlicense: mit\n---\nAll by hand.\n")
    card = ModelCard(build_card(folder))
    assert card.text.strip() == "All by hand." and card.data.library_name == "transformers"


def test_metadata_by_hand_is_kept_and_results_of_other_data_too(folder):
    card = ModelCard.load(folder / "README.md")
    card.data.license, card.data.pipeline_tag = "gpl-3.0", "other"
    other = EvalResult("image-classification", "uoft-cs/cifar10", "CIFAR-10", "accuracy", 0.5, dataset_split="test")
    card.data.eval_results.append(other)
    card.save(folder / "README.md")
    data = ModelCard(build_card(folder)).data
    assert (data.license, data.pipeline_tag) == ("gpl-3.0", "other")
    found = [result.dataset_type for result in data.eval_results]
    assert found.count("uoft-cs/cifar10") == 1 and found.count("imagefolder") == 3
    theirs = "---\nlicense: mit\n---\nTheir words.\n"
    assert user_text(theirs) == "Their words." and user_text(build_card(folder)) == user_text("") == ""
    assert ModelCard(build_card(folder, base=theirs)).text.strip() == "Their words."
    for broken in (BEGIN, f"{END} {BEGIN}"):
        with pytest.raises(ValueError, match="once, in this order"):
            build_card(folder, base=f"---\nlicense: mit\n---\n{broken}\n")


def test_a_commit_that_does_not_prove_itself_is_an_error_with_the_way_back(hub, folder, monkeypatch):
    for name, value in hub.environment(folder, TOKEN).items():
        monkeypatch.setenv(name, value)
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    sha = hub.create(f"models/{NAME}", files).at("main").sha
    expected = {"logits": torch.zeros(2, 10), "scores": torch.zeros(10)}
    with pytest.raises(
        RuntimeError, match=f"{sha} does not give what the folder gives: logits, scores\nto go back: pull"
    ):
        verify_commit(NAME, sha, "AutoModelForImageClassification", expected, "pull")
    with pytest.raises(RuntimeError, match=r"does not load in a fresh process: .*\nto go back: pull"):
        verify_commit("user/nowhere", sha, "AutoModelForImageClassification", expected, "pull")


def test_a_card_is_made_of_what_there_is(folder, tmp_path):
    """Without a record, in shards, of features alone, in mid-training."""
    (folder / "provenance.json").unlink()
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    assert "## Results" in build_card(folder) and "versions" not in build_card(folder)
    train = json.loads(rows[0]) | {"step": 90}
    validation = next(row for row in rows if '"validation"' in row)
    (folder / "metrics.jsonl").write_text(f"{validation}\n{json.dumps(train)}\n")
    assert "validation images" in build_card(folder) and "as measured at step 40" in build_card(folder)
    (folder / "metrics.jsonl").write_text('{"step": 1')
    with pytest.raises(ValueError, match=r"metrics\.jsonl: expected a JSON object in each line"):
        build_card(folder)

    names = {index: f"feature {index}" for index in range(5)}
    model = tiny(id2label=names, label2id={name: index for index, name in names.items()})
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    card = build_card(tmp_path / "shards", license="mit")
    assert f"{model.num_parameters() / 1e6:.2f} million" in card and "features, no classes" in card
    assert ModelCard(card).data.pipeline_tag == "image-feature-extraction"

    ViTSimpleModel(model.config).save_pretrained(tmp_path / "backbone")
    shutil.copy(folder / "preprocessor_config.json", tmp_path / "backbone")
    edit(tmp_path / "backbone", "preprocessor_config.json", lambda text: text.replace(": 8", ": 16"))
    assert check(tmp_path / "backbone")[1] == []
    assert fresh_outputs(str(tmp_path / "backbone"))["pooler_output"].shape == (2, 32)


@pytest.mark.parametrize(
    "text, found",
    [
        ("hf_" + "a1B2" * 8, True),
        ("github_pat_" + "a1" * 20, True),
        ("https://me:word@host/data", True),
        ("-----BEGIN RSA PRIVATE KEY-----", True),
        ("my-own-secret-value", True),
        ("https://host:8080/sk-learn-digits-small-patch4-run2", False),
        ("ViTImageProcessor", False),
    ],
)
def test_secrets_are_told_from_words(monkeypatch, text, found):
    monkeypatch.setenv("SOME_API_KEY", "my-own-secret-value")
    monkeypatch.setenv("TOKENIZER_NAME", "ViTImageProcessor")
    with pytest.raises(ValueError, match=r"README\.md: expected no secrets") if found else contextlib.nullcontext():
        refuse_secrets({"README.md": text.encode()})


def test_the_interval_is_wilsons():
    assert interval(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert interval(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
