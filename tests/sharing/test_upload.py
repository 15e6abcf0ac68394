"""The real client of huggingface_hub pushes folders to the Hub of tests/fake_hub, while connections fail."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard

from tests.conftest import DIGITS, environment_without_package
from tests.fake_hub.hub import Fault, Hub
from tests.sharing.conftest import NAME, PROGRAMS, TOKEN, call, call_program, edit
from vit_simple import ViTSimpleForImageClassification
from vit_simple.files import ONNX_FILES, ROOT, RunError, UserError
from vit_simple.sharing import upload as sharing_upload
from vit_simple.sharing.card import BEGIN
from vit_simple.sharing.commit import Target
from vit_simple.sharing.upload import push, set_tag, verify_commit


def push_command(hub: Hub, work: Path, *arguments, **options) -> subprocess.CompletedProcess:
    return call(hub, work, ROOT / "push_to_hub.py", *arguments, **options)


def head(hub: Hub, revision: str = "main"):
    return hub.repos[f"models/{NAME}"].at(revision)


# A run that pushes


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


def test_train_makes_one_private_commit_per_save_and_one_at_the_end(trained):
    hub, _, _ = trained
    titles = [commit.title for commit in head(hub).history()[::-1]]
    assert titles == ["initial commit", "step 40 of digits", "end of digits"]
    assert hub.repos[f"models/{NAME}"].private


def test_train_uploads_neither_its_checkpoints_nor_the_token(trained):
    hub, _, _ = trained
    for commit in head(hub).history():
        assert not any("checkpoint" in name or name.endswith((".bin", ".pt")) for name in commit.files)
        assert all(TOKEN.encode() not in content for content in commit.files.values())


def test_printed_line_loads_the_last_commit_without_the_package(trained, tmp_path):
    hub, folder, printed = trained
    commits = [head(hub)]  # only the last push is verified
    lines = re.findall(r"^transformers\..*$", printed, flags=re.MULTILINE)
    assert [re.search('revision="(.*?)"', line)[1] for line in lines] == [commit.sha for commit in commits]
    python = environment_without_package(tmp_path / "environment")
    (tmp_path / "elsewhere").mkdir()
    command, variables = [python, PROGRAMS / "load_lines.py", json.dumps(lines)], hub.environment(tmp_path, TOKEN)
    loaded = subprocess.run(command, cwd=tmp_path / "elsewhere", env=variables, capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr
    with torch.no_grad():
        expected = ViTSimpleForImageClassification.from_pretrained(folder)(torch.ones(1, 3, 8, 8)).logits
    assert json.loads(loaded.stdout.splitlines()[-1]) == expected.tolist()


def test_pushed_card_states_the_license_and_the_last_result(trained):
    hub, folder, _ = trained
    card = ModelCard(head(hub).files["README.md"].decode())
    assert f'model="{NAME}"' in card.text and card.data.license == "apache-2.0"
    result = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    metrics = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert metrics["top-1 accuracy"] == result["top1"] and "loss" not in metrics
    assert f"({result['correct']} correct)" in card.text


def test_push_of_an_unchanged_folder_does_nothing(trained, tmp_path):
    hub, folder, _ = trained
    before, card = head(hub), (folder / "README.md").read_text()
    result = push_command(hub, tmp_path, folder, NAME, "--private")
    assert f"nothing to push: {hub.url}/{NAME} already has these files, at {before.sha}" in result.stdout
    assert head(hub).sha == before.sha and (folder / "README.md").read_text() == card


@pytest.fixture(scope="module")
def pushed(trained, tmp_path_factory) -> list[str]:
    """What four pushes of a changed card print: to a branch with a tag, twice as a pull request, to an old tag."""
    hub, folder, _ = trained
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\nBy the user.\n")
    branch = ["--revision", "next", "--tag", "v1", "--commit_message", "The user's text"]
    options = [branch, ["--create_pr"], ["--create_pr"], ["--tag", "v1"]]
    arguments = json.dumps([[str(folder), NAME, *each] for each in options])
    output = call_program(hub, tmp_path_factory.mktemp("pushed"), "push_several.py", arguments)
    return json.loads(output.splitlines()[-1])


def test_push_to_a_branch_with_a_tag_leaves_main_alone(trained, pushed):
    hub, _, _ = trained
    assert head(hub).title == "end of digits"
    assert head(hub, "v1").sha == head(hub, "next").sha and head(hub, "v1").title == "The user's text"
    card = head(hub, "v1").files["README.md"].decode()
    assert 'revision="v1"' in card and card.endswith("\nBy the user.\n")


def test_push_as_a_pull_request_opens_one_and_only_one(trained, pushed):
    hub, _, _ = trained
    assert f"{hub.url}/{NAME}/discussions/1" in pushed[1] and "nothing to push" in pushed[2]
    assert head(hub, "refs/pr/1").parent.sha == head(hub).sha
    assert "refs/pr/2" not in hub.repos[f"models/{NAME}"].refs


def test_push_refuses_a_tag_that_exists(pushed):
    assert "--tag: v1 already exists" in pushed[3]


def test_pushed_private_revisions_load_only_with_the_token(trained, pushed, tmp_path):
    hub, _, _ = trained
    code = f"""
from transformers import AutoModelForImageClassification
for revision in ("main", "next", "v1", "refs/pr/1"):
    AutoModelForImageClassification.from_pretrained("{NAME}", revision=revision, trust_remote_code=True)
    print("loaded", revision)
try:
    AutoModelForImageClassification.from_pretrained("{NAME}", token=False, force_download=True, trust_remote_code=True)
except OSError as error:
    print("private:", str(error).splitlines()[0])
"""
    loaded = call(hub, tmp_path, "-c", code).stdout
    assert loaded.count("loaded") == 4 and f"private: {NAME} is not a local folder" in loaded


# Before a push


def test_dry_run_prints_files_and_card_and_changes_nothing(folder, monkeypatch, capsys):
    monkeypatch.setattr(sharing_upload, "local_outputs", lambda folder: {})
    (folder / ".env").write_text("SECRET=1")
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "optimizer.bin").write_text("state")
    assert push(folder, NAME, dry_run=True) is None
    listing, _, card = capsys.readouterr().out.partition("\n---\n")
    names = {line.split()[-1] for line in listing.splitlines() if line}
    assert names == {path.name for path in folder.iterdir()} - {
        ".env",
        ".lock",
        "checkpoints",
        "finished.json",
        "optimizer.bin",
    }
    assert f'model="{NAME}"' in card and f'model="{NAME}"' not in (folder / "README.md").read_text()


def test_push_refuses_a_run_that_is_not_finished(folder):
    (folder / "finished.json").unlink()
    with pytest.raises(UserError, match="is not finished, and its weights and results may be of different steps"):
        push(folder, NAME, dry_run=True)


def test_push_requires_a_license(folder):
    edit(folder / "README.md", "license: mit\n", "")
    with pytest.raises(UserError, match="--license is required"):
        push(folder, NAME, dry_run=True)


@pytest.mark.parametrize("token, reason", [(None, "Token is required"), ("hf_wrong_wrong_wrong", "Invalid user token")])
def test_push_without_a_valid_token_ends_with_status_2_and_changes_nothing(hub, folder, tmp_path, token, reason):
    result = push_command(hub, tmp_path, folder, NAME, token=token)
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert "hf auth login" in result.stderr and reason in result.stderr and not hub.repos


def test_train_without_a_token_stops_before_it_trains(hub, tmp_path):
    options = ["--push_to_hub", "--hub_model_id", NAME, "--license", "mit", "--output_dir", tmp_path / "run"]
    result = call(hub, tmp_path, ROOT / "train.py", *options, token=None)
    assert "hf auth login" in result.stderr and not (tmp_path / "run").exists()


def test_push_takes_the_onnx_files_along_and_verifies_them(hub, exported, tmp_path):
    result = push_command(hub, tmp_path, exported, NAME, "--license", "mit")
    assert result.returncode == 0 and "verified: " in result.stdout, result.stderr
    for name in ONNX_FILES:
        assert head(hub).files[name] == (exported / name).read_bytes()
        assert sum(f"/resolve/{head(hub).sha}/{name}" in request.path for request in hub.log) > 0  # downloaded again
    assert "| onnx/model.onnx |" in head(hub).files["README.md"].decode()


# The upload


LOST = {"cut": "answer"}
STALE = {"model-00001-of-00002.safetensors": b"stale", "processor_config.json": b"stale"}
FAULTS = {  # the faults by the path of a request, and the outcome
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
    "overtaken": ([], "overtaken"),
}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """The repositories, their heads before, and the results of uploads that met faults."""
    parents = {}
    with Hub({TOKEN: "user"}) as hub:
        for name, (faults, outcome) in FAULTS.items():
            repo = hub.create(f"models/user/{name}", dict(STALE, **{"NOTES.md": b"not ours"}))
            parents[name] = repo.at("main").sha
            if outcome == "overtaken":
                repo.add("refs/heads/main", {**repo.at("main").files, "config.json": b"not ours"}, "not ours")
            for path, fault in faults:
                hub.faults.append(Fault(f"{name}.*{path}" if path == "/commit/" else path, **fault))
        uploads = [
            {"repo": f"user/{name}", "parent": parents[name], "create_pr": outcome == "requested"}
            for name, (_, outcome) in FAULTS.items()
        ]
        work = tmp_path_factory.mktemp("faulty")
        output = call_program(hub, work, "upload_several.py", json.dumps(uploads), len(uploads))
    results = dict(zip(FAULTS, json.loads(output.splitlines()[-1])))
    repos = {name: hub.repos[f"models/user/{name}"] for name in FAULTS}
    return repos, parents, results


def names_with(*outcomes: str) -> list[str]:
    return [name for name, (_, outcome) in FAULTS.items() if outcome in outcomes]


@pytest.mark.parametrize("name", names_with("pushed", "requested"))
def test_upload_ends_in_exactly_one_commit_after_a_fault(faulty, name):
    repos, parents, results = faulty
    is_request = FAULTS[name][1] == "requested"
    commit = repos[name].at("refs/pr/1" if is_request else "main")
    assert commit.sha == results[name] and commit.parent.sha == parents[name], results[name]
    assert "refs/pr/2" not in repos[name].refs
    assert not is_request or repos[name].at("main").sha == parents[name]


@pytest.mark.parametrize("name", names_with("pushed", "requested"))
def test_upload_deletes_stale_files_and_keeps_those_of_others(faulty, name):
    repos, _, _ = faulty
    files = repos[name].at("refs/pr/1" if FAULTS[name][1] == "requested" else "main").files
    ours = ("README.md", "config.json", "model.safetensors")
    assert {path: files[path] for path in ours} == {path: f"{path} 1".encode() for path in ours}
    assert "NOTES.md" in files and not STALE.keys() & files.keys()


@pytest.mark.parametrize("name", names_with("refused"))
def test_upload_that_is_refused_leaves_the_repository_as_it_was(faulty, name):
    repos, parents, results = faulty
    assert repos[name].at("main").sha == parents[name] and "Error: " in results[name]


def test_upload_refuses_a_branch_that_changed_since_it_was_checked(faulty):
    repos, parents, results = faulty
    now = repos["overtaken"].at("main")
    assert now.title == "not ours"
    changed = f"user/overtaken changed since it was checked ({parents['overtaken']} is now {now.sha})"
    assert results["overtaken"] == f"RunError: {changed}; review it and push again"


def test_upload_forbidden_is_a_mistake_of_the_user(faulty):
    assert faulty[2]["forbidden"].startswith("UserError: no access to the Hub")


def test_uploads_under_random_faults_leave_no_broken_head(hub, tmp_path, request):
    count = request.config.getoption("--pushes")
    repo = hub.create("models/user/random")
    hub.disturb(0.1, seed=1)
    uploads = [{"repo": "user/random", "number": number} for number in range(1, 1 + count)]
    output = call_program(hub, tmp_path, "upload_several.py", json.dumps(uploads), 1)
    commits = {commit.sha: commit for commit in repo.at("main").history() if commit.parent}
    results = {number: result for number, result in enumerate(json.loads(output.splitlines()[-1]), 1) if result}
    pushed = {sha: number for number, sha in results.items() if sha in commits}
    assert len(results) > count / 2 and len(pushed) > len(results) / 2
    numbers = [commit.title.split()[-1] for commit in commits.values()]
    assert len(set(numbers)) == len(numbers)  # no upload made two commits
    for sha, commit in commits.items():
        number = commit.title.split()[-1]
        assert pushed.get(sha, int(number)) == int(number)
        for name in ("README.md", "config.json", "model.safetensors"):
            assert commit.files[name] == f"{name} {number}".encode()
    assert all("Error: " in result for result in results.values() if result not in commits)
    assert not any(TOKEN in json.dumps(asked.headers) for asked in hub.log if "/storage/" in asked.path)


class Api:
    """The answers that verification and tagging need."""

    endpoint = "https://hub"

    def repo_info(self, repo_id: str) -> SimpleNamespace:
        return SimpleNamespace(private=False, gated=False)

    def create_tag(self, *arguments, **options):
        raise OSError("403 Forbidden")


TARGET, LOGITS = Target(NAME, False, None, False, "v1"), {"logits": torch.ones(2, 10)}


def test_verification_advises_to_undo_the_push_only_if_the_outputs_differ(monkeypatch):
    outputs = {"logits": torch.zeros(2, 10)}
    monkeypatch.setattr(sharing_upload, "fresh_outputs", lambda *arguments, **options: outputs)
    with pytest.raises(
        RunError, match=r"abc differs from the folder in logits\nto undo the push: git clone .*revert abc"
    ):
        verify_commit(Api(), TARGET, "abc", "AutoModel", LOGITS, "push again")


def test_verification_is_tried_again_if_the_commit_cannot_be_loaded_yet(monkeypatch, capsys):
    answers = [UserError("503"), UserError("503"), LOGITS]

    def load(*arguments, **options):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(sharing_upload, "fresh_outputs", load)
    monkeypatch.setattr(sharing_upload, "VERIFY_WAITS", (0, 0))
    verify_commit(Api(), TARGET, "abc", "AutoModel", LOGITS, "push again")
    assert "verified: " in capsys.readouterr().out and not answers


def test_commit_that_cannot_be_loaded_is_called_unverified_and_not_wrong(hub, folder, monkeypatch):
    for name, value in hub.environment(folder, TOKEN).items():
        monkeypatch.setenv(name, value)
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    sha = hub.create(f"models/{NAME}", files).at("main").sha
    hub.faults.append(Fault("/storage/", status=404, times=999))  # 503 is tried again for minutes
    monkeypatch.setattr(sharing_upload, "VERIFY_WAITS", ())
    with pytest.raises(RunError) as caught:
        verify_commit(Api(), TARGET, sha, "AutoModelForImageClassification", LOGITS, TARGET.command(folder))
    assert f"the commit {sha} is on the Hub, but it could not be verified: " in str(caught.value)
    assert f"to verify it again: python push_to_hub.py {folder} {NAME} --tag v1" in str(caught.value)
    assert "undo" not in str(caught.value) and "revert" not in str(caught.value)


def test_command_that_pushes_again_quotes_its_words():
    target = Target(NAME, False, "my branch", True, "v1")
    options = "--revision 'my branch' --tag v1 --create_pr"
    assert target.command(Path("my outputs/digits")) == f"python push_to_hub.py 'my outputs/digits' {NAME} {options}"


def test_tag_that_fails_leaves_a_verified_commit_and_says_so():
    with pytest.raises(
        RunError, match=r"the commit abc is on the Hub and verified, but .* v1: 403 Forbidden\nto try again"
    ):
        set_tag(Api(), TARGET, "abc", "push again")


# The user's text on the Hub


def test_push_keeps_the_text_on_the_hub_unless_the_folder_has_its_own(hub, folder, tmp_path):
    card = (folder / "README.md").read_text()
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    their_card = card.replace("license: mit\n", "").replace(BEGIN, f"Theirs.\n\n{BEGIN}")
    theirs = {**files, "README.md": their_card.encode()}
    for name, text in (("kept", ""), ("replaced", "Mine.")):
        hub.create(f"models/user/{name}", theirs)
        shutil.copytree(folder, tmp_path / name)
        (tmp_path / name / "README.md").write_text(f"{card}\n{text}\n")
    code = """
from vit_simple.sharing.upload import push
for name in ("kept", "replaced"):
    push(name, f"user/{name}", verify=False)
"""
    result = call(hub, tmp_path, "-c", code)
    assert "README.md keeps the text that was written on the Hub\n" in result.stdout, result.stderr
    assert "README.md replaces another text on the Hub" in result.stdout
    kept, replaced = (hub.repos[f"models/user/{name}"].at("main").files for name in ("kept", "replaced"))
    assert ModelCard(kept["README.md"].decode()).text.strip().startswith("Theirs.")
    for content in (kept["README.md"], replaced["README.md"], (tmp_path / "kept/README.md").read_bytes()):
        assert ModelCard(content.decode()).data.license == "mit"
    assert ModelCard(replaced["README.md"].decode()).text.strip().endswith("Mine.")


# Pushes of Trainer, and datasets of the Hub


def test_trainer_pushes_commits_that_load_in_one_line(hub, run_folder, tmp_path):
    call_program(hub, tmp_path, "push_with_trainer.py", run_folder)
    commits = [commit for commit in hub.repos["models/user/trained"].at("main").history() if commit.parent]
    assert len({commit.files.get("model.safetensors") for commit in commits}) >= 3
    code = f"""
from transformers import pipeline
for sha in {[commit.sha for commit in commits]!r}:
    predict = pipeline("image-classification", "user/trained", revision=sha, trust_remote_code=True)
    print(sha, type(predict.model).__module__)
"""
    loaded = call(hub, tmp_path, "-c", code)
    assert loaded.stdout.count("transformers_modules") == len(commits), loaded.stderr


def test_hub_dataset_is_trained_on_and_its_revision_is_in_the_card(hub, tmp_path):
    files = {}
    for split in ("train", "test"):
        (path,) = Path(DIGITS).glob(f"{split}*.parquet")
        files[f"data/{path.name}"] = path.read_bytes()
    commit = hub.create("datasets/user/digits", files).at("main")
    code = """
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
        assert card.data.eval_results[0].dataset_revision == commit.sha
        assert "On 360 test images of user/digits" in card.text
