"""From a config to engines: the bundle's student, its teacher where it can be had, on a device.

Torch and onnxruntime are imported when a model needs them, not before.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bundle.errors import BundleError, UserError, one_line
from bundle.hashing import hash_file
from bundle.manifest import MANIFEST_NAME, Manifest
from bundle.model_folder import open_model_folder
from bundle.token_ids import read_eos_token_ids
from bundle.verify import verify_bundle
from serve.app.config import Device, ServeConfig
from serve.app.find_teacher import find_teacher
from serve.cpus import count_cpus
from serve.engine.engine import Engine
from serve.engine.turns import StepArbiter
from serve.errors import DeviceMissingError
from serve.metrics.server_metrics import ServerMetrics
from serve.models.noise import MAX_PATH_NOISE_NATS, NoiseFloor, measure_noise_floor
from serve.pair.served import Engines, Role, ServedModel
from serve.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

    from serve.models.backend import Backend, ModelInfo

logger = logging.getLogger(__name__)

_HALF_PRECISIONS = ("float16", "bfloat16")


def build_engines(config: ServeConfig, metrics: ServerMetrics) -> Engines:
    """Load the bundle's student, and the teacher that `find_teacher` names; or one of them.

    Raises:
        BundleError: the bundle is damaged, or `variant` is not in it.
        DeviceMissingError: CUDA is asked for and a runtime cannot use it.
        UserError: a model cannot be served: architecture or context length.
    """
    runtimes = set() if config.no_student else {config.student_backend}
    if config.device == "cuda":
        choose_device(config.device, runtimes)  # before gigabytes are hashed
    manifest = None if config.bundle is None else verify_bundle(config.bundle)
    _judge_folders(config)
    folder = find_teacher(config, None if manifest is None else manifest.teacher)
    device = choose_device(
        config.device, runtimes | ({config.teacher_backend} if folder else set())
    )
    # On one CPU two engines take turns, the student first; on CUDA the device schedules.
    is_shared = device == "cpu" and folder is not None and not config.no_student
    loader = _Loader(config, manifest, metrics, device, StepArbiter() if is_shared else None)
    student = None if config.no_student else loader.load_student()
    if student is None or config.teacher_address is None:
        return Engines(student, loader.load_teacher(folder, student) if folder else None)
    from serve.app.remote import reach_teacher

    assert manifest is not None, "who has a student has a bundle"
    teacher = reach_teacher(config, config.teacher_address, manifest.teacher, student, metrics)
    return Engines(student, teacher)


def _judge_folders(config: ServeConfig) -> None:
    """Refuse the models that are named before any of them is loaded."""
    if config.bundle is not None and not config.no_student:
        open_model_folder(config.bundle / "student")
    if isinstance(config.teacher, Path) and not config.no_teacher:
        open_model_folder(config.teacher, has_weights=config.teacher_backend == "torch")


def _warn_of_few_rows(folder: Path, tokenizer: Tokenizer, engine: Engine) -> None:
    num_rows, last = engine.info.vocab_size, tokenizer.num_tokens - 1
    if last >= num_rows:
        logger.warning(
            "%s has a model of %d rows, and a tokenizer with ids up to %d, which is %r: texts with "
            "a token from %d on are refused; resize the model's embeddings to the tokenizer",
            *(folder, num_rows, last, tokenizer.token_text(last), num_rows),
        )


def choose_device(asked: Device, runtimes: Set[str]) -> str:
    """Return cpu or cuda; auto is cuda only where every one of `runtimes` (onnx, torch) can.

    Raises:
        DeviceMissingError: cuda is asked for, and one of them cannot.
    """
    if asked == "cpu":
        return asked
    problem = next(filter(None, map(_why_no_cuda, sorted(runtimes))), "")
    if not problem:
        return "cuda"
    if asked == "cuda":
        raise DeviceMissingError(f"--device cuda: {problem}; use cpu or auto")
    logger.info("on the CPU: %s", problem)
    return "cpu"


def _why_no_cuda(runtime: str) -> str:
    import torch

    if runtime == "onnx":
        import onnxruntime  # type: ignore[import-untyped, unused-ignore]

        providers = onnxruntime.get_available_providers()
        if "CUDAExecutionProvider" not in providers:
            names = ", ".join(providers)
            return f"onnxruntime has {names} and not CUDAExecutionProvider (extra `gpu`)"
    # The provider says what was built in, not that there is a device; streams are torch's anyway.
    return "" if torch.cuda.is_available() else "torch finds no CUDA device"


@dataclass(frozen=True, slots=True)
class _Loader:
    config: ServeConfig
    manifest: Manifest | None
    metrics: ServerMetrics
    device: str
    arbiter: StepArbiter | None

    @property
    def num_threads(self) -> int:
        return self.config.threads or count_cpus()

    @property
    def _bundle(self) -> Path:
        assert self.config.bundle is not None, "who has a student has a bundle"
        return self.config.bundle

    @property
    def _manifest(self) -> Manifest:
        assert self.manifest is not None, "who has a student has a bundle"
        return self.manifest

    def load_student(self) -> ServedModel:
        bundle = self._bundle
        stream = self._open_stream(Role.STUDENT)
        with _loading(bundle):
            tokenizer = Tokenizer.load(bundle / "student")
            engine, noise = self._build_engine(
                Role.STUDENT,
                self._student_backend(stream, tokenizer),
                bundle / "student",
                stream,
                rounds_activations=self._student_rounds_activations(),
            )
        _warn_of_few_rows(bundle / "student", tokenizer, engine)
        return ServedModel(
            Role.STUDENT,
            engine,
            tokenizer,
            bundle_id=bundle.resolve().name,
            manifest_sha256=hash_file(bundle / MANIFEST_NAME),
            noise=noise,
            backend_noise_nats=self._backend_noise(),
        )

    def load_teacher(self, folder: Path, student: ServedModel | None) -> ServedModel:
        stream = self._open_stream(Role.TEACHER)
        with _loading(folder):
            open_model_folder(folder, has_weights=self.config.teacher_backend == "torch")
            tokenizer = Tokenizer.load(folder)
            engine, noise = self._build_engine(
                Role.TEACHER, self._teacher_backend(folder, stream, tokenizer), folder, stream
            )
        _warn_of_few_rows(folder, tokenizer, engine)
        # One vocabulary, one tokenizer: both models must see the very same prompt.
        if student is not None and tokenizer.hash == student.tokenizer.hash:
            tokenizer = student.tokenizer
        return ServedModel(Role.TEACHER, engine, tokenizer, noise=noise)

    def _open_stream(self, role: Role) -> torch.cuda.Stream | None:
        """Return the stream of an engine on CUDA: kernels of the student's are started first."""
        if self.device == "cpu":
            return None
        import torch

        return torch.cuda.Stream(self.device, priority=-1 if role is Role.STUDENT else 0)

    def _build_engine(
        self,
        role: Role,
        backend: Backend,
        folder: Path,
        stream: torch.cuda.Stream | None,
        *,
        rounds_activations: bool = False,
    ) -> tuple[Engine, NoiseFloor]:
        """Return the engine and its noise floor, whose measuring warms the backend up."""
        backend.choose_kernels()
        noise = measure_noise_floor(backend)
        # On CUDA one pass differs by rounding alone, and decoding instead would cost too much.
        is_quiet = noise.path_nats <= MAX_PATH_NOISE_NATS and not rounds_activations
        in_one_pass = self.device != "cpu" or is_quiet
        self._log_engine(role, backend.info, noise, in_one_pass)
        engine = Engine(
            backend,
            eos_token_ids=read_eos_token_ids(folder),
            max_waiting=self.config.max_waiting,
            name=role.value,
            observer=self.metrics.observer(role),
            arbiter=self.arbiter,
            priority=0 if role is Role.STUDENT else 1,
            scores_in_one_pass=in_one_pass,
            # The student's matrix products are onnxruntime's; torch only samples for it.
            num_torch_threads=1 if backend.info.backend == "onnx" else self.num_threads,
            max_pass_tokens=self.config.max_pass_tokens,
            max_num_seqs_per_client=self.config.max_num_seqs_per_client,
            max_prefix_cache_bytes=self.config.prefix_cache_mib << 20,
            stream=stream,
            max_step_s=self.config.max_step_s,
        )
        return engine, noise

    def _log_engine(
        self, role: Role, info: ModelInfo, noise: NoiseFloor, in_one_pass: bool
    ) -> None:
        logger.info(
            "%s: %s %s on %s; one pass and decoding differ by %.1e nats at most, so it scores %s",
            *(role.value, info.backend, info.precision, info.device, noise.path_nats),
            "in one pass" if in_one_pass else "by forced decoding",
        )
        if not info.batch_invariant:
            logger.warning(
                "%s: its tokens may depend on what else runs: %s",
                role.value,
                "not checked on CUDA"
                if self.device != "cpu"
                else "in every way tried, batches changed bits",
            )

    def _student_rounds_activations(self) -> bool:
        """Whether the student's kernels round activations to int8 (accuracy level 4).

        Then a last bit may tip a rounding and become whole tenths of a nat: in a small model only
        once in a hundred tokens, which the short text of `measure_noise_floor` may not hold.
        """
        is_onnx = self.config.student_backend == "onnx"
        return is_onnx and self._manifest.variants[self._variant_name()].accuracy_level == 4

    def _backend_noise(self) -> float | None:
        """KL(float student in torch || served graph) as the export measured it, if it did."""
        if self.config.student_backend != "onnx":
            return None
        return self._manifest.variants[self._variant_name()].metrics.get("kl_to_student")

    def _variant_name(self) -> str:
        """Return the variant to serve: the one asked for, else the default.

        On CUDA the default is the first one in half precision, the only ones that can run there.
        """
        variants, asked = self._manifest.variants, self.config.variant
        if asked is not None:
            if asked not in variants:
                raise BundleError(f"variant {asked!r} is none of {', '.join(sorted(variants))}")
            return asked
        half = [name for name, v in variants.items() if v.precision in _HALF_PRECISIONS]
        return half[0] if half and self.device != "cpu" else self._manifest.default_variant

    def _student_backend(self, stream: torch.cuda.Stream | None, tokenizer: Tokenizer) -> Backend:
        config, variants = self.config, self._manifest.variants
        if config.student_backend == "torch":
            return self._load_torch(self._bundle / "student", "float32", tokenizer)
        name = self._variant_name()
        return self._load_onnx(
            self._bundle / "onnx" / name,
            stream,
            tokenizer,
            precision=variants[name].precision,
            num_parameters=self._manifest.student.num_parameters,
        )

    def _teacher_backend(
        self, folder: Path, stream: torch.cuda.Stream | None, tokenizer: Tokenizer
    ) -> Backend:
        if self.config.teacher_backend == "torch":
            return self._load_torch(folder, self.config.teacher_dtype, tokenizer)
        return self._load_onnx(folder, stream, tokenizer)

    def _load_torch(self, folder: Path, dtype: str, tokenizer: Tokenizer) -> Backend:
        import torch

        from serve.models.torch_backend import TorchBackend

        torch.set_num_threads(self.num_threads)
        return TorchBackend.load(
            folder,
            device=self.device,
            dtype=getattr(torch, dtype),
            max_num_seqs=self.config.max_num_seqs,
            max_model_len=self.config.max_model_len,
            real_tokens=tokenizer.real_tokens,
        )

    def _load_onnx(
        self,
        folder: Path,
        stream: torch.cuda.Stream | None,
        tokenizer: Tokenizer,
        **described: Any,
    ) -> Backend:
        from serve.models.onnx_backend import OnnxBackend

        return OnnxBackend.load(
            folder,
            device=self.device,
            max_num_seqs=self.config.max_num_seqs,
            max_model_len=self.config.max_model_len,
            num_threads=self.num_threads,
            shares_cores=self.arbiter is not None,
            stream=stream.cuda_stream if stream else None,
            real_tokens=tokenizer.real_tokens,
            **described,
        )


@contextmanager
def _loading(folder: Path) -> Iterator[None]:
    """Say which model could not be loaded, and why, in one line."""
    try:
        yield
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(one_line(f"cannot load {folder}: {error}")) from error
    # Each library has errors of its own, some of no other kind than Exception; and a file that is
    # not what a library expects may break it anywhere.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(one_line(f"cannot load {folder}: {reason}")) from error
