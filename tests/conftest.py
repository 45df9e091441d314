"""What the tests share: tiny models of real architectures, a tokenizer, pairs, and the real data where it is."""

import os

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # workers that each use every core only get in each other's way
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["USE_HUB_KERNELS"] = "0"

import ast
import atexit
import hashlib
import json
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from filelock import FileLock
from hub_server import hub, slept  # noqa: F401 - fixtures
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from orpo_lite.data import cache, dataset
from orpo_lite.data.chat_template import Template
from orpo_lite.data.pair import TokenizedPair
from orpo_lite.data.render_process import LimitedRenderer

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
WORDS = "red blue green round square small large old new warm cold bright dark soft hard quick slow".split()

torch.set_num_threads(1)
os.environ["ORPO_LITE_CACHE"] = tempfile.mkdtemp(
    prefix="orpo-lite-tests-"
)  # of this session, never the person's own
atexit.register(shutil.rmtree, os.environ["ORPO_LITE_CACHE"], ignore_errors=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, with the reason."""
    absent = pytest.mark.skip(
        reason="the real data and models are not beside the project (../shared)"
    )
    no_gpu = pytest.mark.skip(reason="no CUDA device")
    long = pytest.mark.skip(reason="minutes long; ask for it with -m long")
    for item in items:
        if "real" in item.keywords and not SHARED.is_dir():
            item.add_marker(absent)
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if "long" in item.keywords and "long" not in config.getoption("-m"):
            item.add_marker(long)


def first_and_long(cases: Iterable[Any]) -> list[Any]:
    """The first of several forms of one test; the others are slow, and asked for with -m long."""
    first, *others = cases
    return [first, *(pytest.param(case, marks=pytest.mark.long) for case in others)]


# As torch's allocator says it, the driver and cuBLAS.
OUT_OF_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
)


def tiny_llama(vocab_size: int = 96, **changes: Any) -> LlamaForCausalLM:
    """Two layers of a Llama: grouped heads, RMSNorm, RoPE, untied head; random and reproducible."""
    shape = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(shape | changes)))


def in_float64(model: Any) -> Any:
    """The model in float64, its RMSNorms too: transformers' own round to float32 inside, whatever the dtype."""

    def norm(module: Any, x: torch.Tensor) -> torch.Tensor:
        return (
            module.weight
            * x
            * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)
        )

    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = partial(norm, module)
    return model.double()


def tiny_opt(vocab_size: int = 96) -> OPTForCausalLM:
    """Two layers of an OPT: learned positions, LayerNorm, biases, ReLU, tied head."""
    torch.manual_seed(0)
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=vocab_size,
            hidden_size=64,
            ffn_dim=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
            word_embed_proj_dim=64,
            dropout=0.0,
            init_std=0.2,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of printable characters: no merges, so that prompt and response tokenize as they do joined."""
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocab = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *characters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=256,
    )


def ragged_pairs(count: int, *, vocab_size: int = 96, seed: int = 0) -> list[TokenizedPair]:
    """Pairs of random tokens and very different lengths."""
    rng = random.Random(seed)
    pairs = []
    for index in range(count):
        prompt = [1, *(rng.randrange(3, vocab_size) for _ in range(rng.randrange(1, 12)))]
        sides = [
            prompt + [rng.randrange(3, vocab_size) for _ in range(rng.randrange(1, 20))] + [2]
            for _ in range(2)
        ]
        pairs.append(TokenizedPair(sides[0], sides[1], len(prompt), len(prompt), f"row {index}"))
    return pairs


def write_pairs(path: Path, count: int, *, seed: int = 0) -> Path:
    """A jsonl of explicit-prompt pairs about nothing, each prompt its own."""
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        chosen, rejected = (" ".join(rng.sample(WORDS, rng.randrange(2, 6))) for _ in range(2))
        rows.append(
            {
                "prompt": f"Item {index}: how is it?",
                "chosen": f"It is {chosen}.",
                "rejected": f"No, {rejected}!",
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_base(folder: Path, model: Any = None) -> Path:
    """A base model folder with the character tokenizer, as the hub would give it."""
    tokenizer = byte_tokenizer()
    (model or tiny_llama(len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all workers of this session: what is in it is never changed, and is put there whole."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


class KeptRenderer(LimitedRenderer):
    """The process that renders a template takes a second to start: it is kept for whoever renders the same one next."""

    idle: ClassVar[dict[str, "KeptRenderer"]] = {}

    def __new__(cls, template: Template) -> "KeptRenderer":
        return cls.idle.pop(json.dumps(asdict(template)), None) or super().__new__(cls)

    def __init__(self, template: Template) -> None:
        if "_process" in vars(self):
            self.template = template
            return
        self.is_answered = True
        super().__init__(template)

    def __exit__(self, kind: Any, error: Any, at: Any) -> None:
        is_well = kind is None and self.is_answered and self._process.poll() is None
        if not is_well or self.idle.setdefault(json.dumps(asdict(self.template)), self) is not self:
            super().__exit__(kind, error, at)

    def send(self, pairs: Any) -> None:
        self.is_answered = False
        super().send(pairs)

    def receive(self) -> Any:
        texts = super().receive()
        self.is_answered = True
        return texts


@pytest.fixture(scope="session", autouse=True)
def kept_renderers() -> Iterator[None]:
    """Processes that render templates are started once for each template, and end with the session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "LimitedRenderer", KeptRenderer)
        yield
    while KeptRenderer.idle:
        _, renderer = KeptRenderer.idle.popitem()
        LimitedRenderer.__exit__(renderer, None, None, None)


@pytest.fixture
def token_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of tokens, for one test."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "tokens"))
    cache.cache_folder.cache_clear()
    yield cache.cache_folder()
    cache.cache_folder.cache_clear()


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory with ``base/`` and ``pairs.jsonl`` (40 pairs) in it."""
    write_base(tmp_path / "base")
    write_pairs(tmp_path / "pairs.jsonl", 40)
    monkeypatch.chdir(tmp_path)
    return tmp_path


SMALL = (
    "model:\n  model_name_or_path: ./base\ndata:\n  dataset_name: ./pairs.jsonl\n  test_split_size: 0.2\n"
    "  max_length: 128\n  max_prompt_length: 96\n"
    "training:\n  output_dir: run\n  learning_rate: 1e-3\n  global_batch_size: 8\n  eval_steps: 0.5\n"
    "output:\n  samples: 1\n  max_new_tokens: 8\n  report: false\n"
)


@pytest.fixture
def small_recipe(workspace: Path) -> Callable[..., Any]:
    """Builds a recipe on the workspace's base and pairs; overrides as on the command line."""
    from orpo_lite.recipe.reader import load_recipe

    def build(*overrides: str) -> Any:
        (workspace / "small.yaml").write_text(SMALL, encoding="utf-8")
        return load_recipe("./small.yaml", overrides)

    return build


@pytest.fixture(scope="session")
def one_training(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any], Any]:
    """The folder of a workspace in which ``small_recipe("training.learning_rate=1e-2")`` was trained; read only."""
    from orpo_lite.api import train_events
    from orpo_lite.recipe.reader import load_recipe

    folder = tmp_path_factory.mktemp("trained")
    write_base(folder / "base")
    write_pairs(folder / "pairs.jsonl", 40)
    (folder / "small.yaml").write_text(SMALL, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        updates, generator = (
            [],
            train_events(load_recipe("./small.yaml", ["training.learning_rate=1e-2"])),
        )
        while True:
            try:
                updates.append(next(generator))
            except StopIteration as end:
                return folder, updates, end.value


@pytest.fixture
def trained(one_training: tuple[Path, list[Any], Any], workspace: Path) -> tuple[list[Any], Any]:
    """The workspace with a finished run in it, a copy of its own: what happened in the training, and its result."""
    folder, updates, result = one_training
    shutil.copytree(folder / "run", workspace / "run")
    (workspace / "small.yaml").write_text(SMALL, encoding="utf-8")
    for name in ("recipe.yaml", "lock.json", "adapter/adapter_config.json"):
        file = workspace / "run" / name
        file.write_text(
            file.read_text("utf-8").replace(str(folder), str(workspace)), encoding="utf-8"
        )
    return updates, result


@dataclass(frozen=True)
class DemoRun:
    """What ``orpo-lite train --recipe demo`` left in a folder of its own; read only."""

    folder: Path
    """It holds ``runs/demo`` and ``runs/builtin``."""
    printed: str
    complained: str
    seconds: float
    """Of the processor."""

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "demo"

    @property
    def base(self) -> Path:
        (found,) = (self.folder / "runs" / "builtin").glob("tiny-llama-*")
        return found


@pytest.fixture(scope="session")
def demo_run(shared_folder: Path) -> DemoRun:
    """The demo as a new user runs it, trained once for all workers of this session."""
    folder = shared_folder / "demo"
    known = shared_folder / "demo.json"
    with FileLock(shared_folder / "demo.lock"):
        if not known.exists():
            folder.mkdir()
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            command = [sys.executable, "-m", "orpo_lite", "train", "--recipe", "demo"]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            known.write_text(json.dumps([done.stdout, done.stderr, seconds]), encoding="utf-8")
    return DemoRun(folder, *json.loads(known.read_text(encoding="utf-8")))


def moved_run(demo: DemoRun, target: Path) -> None:
    """Copy the demo's ``runs`` into another folder, as if it had been trained there."""
    shutil.copytree(demo.folder / "runs", target / "runs")
    for name in ("recipe.yaml", "lock.json", "adapter/adapter_config.json"):
        file = target / "runs" / "demo" / name
        file.write_text(
            file.read_text("utf-8").replace(str(demo.folder), str(target)), encoding="utf-8"
        )


@pytest.fixture
def counted_once(shared_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is counted once for all tests: it depends on nothing but what its file is named after."""
    from orpo_lite.planning.measure import StepMemory, measure

    unread = {"model": {"model_name_or_path"}, "data": {"dataset_name"}, "training": {"output_dir"}}
    unread |= {"memory": {"budget"}}

    def remembered(
        recipe: Any, config: Any, triples: Any, kind: str, planned: Any = None, models: Any = None
    ) -> Any:
        shape = {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}
        asked = (
            recipe.model_dump(exclude=unread),
            shape,
            triples.tolist(),
            kind,
            planned,
            torch.cuda.is_available(),
        )
        file = shared_folder / f"{hashlib.sha256(repr(asked).encode()).hexdigest()}.step"
        if not file.exists():
            found = vars(measure(recipe, config, triples, kind, planned, models))
            whole = file.with_suffix(f".{os.getpid()}")
            whole.write_text(
                repr({key: dict(value) if key == "work" else value for key, value in found.items()})
            )
            whole.replace(file)
        found = ast.literal_eval(file.read_text())
        return StepMemory(**found | {"work": Counter(found["work"])})

    for module in [module for name, module in sys.modules.items() if name.startswith("orpo_lite.")]:
        if getattr(module, "measure", None) is measure:
            monkeypatch.setattr(module, "measure", remembered)


Answer = tuple[int, str, str]


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Answer]:
    """Runs the command line in this process; returns (exit code, what it printed, what it complained of)."""

    from orpo_lite.cli import app as commands

    def run(*arguments: str) -> Answer:
        monkeypatch.setattr(sys, "argv", ["orpo-lite", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            commands.main()
        printed = capsys.readouterr()
        code = ended.value.code
        return code if isinstance(code, int) else 0, printed.out, printed.err

    return run
