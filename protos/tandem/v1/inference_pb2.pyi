from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_STUDENT: _ClassVar[Role]
    ROLE_TEACHER: _ClassVar[Role]

class Route(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROUTE_UNSPECIFIED: _ClassVar[Route]
    ROUTE_STUDENT: _ClassVar[Route]
    ROUTE_TEACHER: _ClassVar[Route]
    ROUTE_BOTH: _ClassVar[Route]
    ROUTE_AUTO: _ClassVar[Route]

class Basis(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BASIS_UNSPECIFIED: _ClassVar[Basis]
    BASIS_TEMPERED: _ClassVar[Basis]
    BASIS_RAW: _ClassVar[Basis]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_CANCELLED: _ClassVar[FinishReason]
    FINISH_REASON_DEADLINE: _ClassVar[FinishReason]
    FINISH_REASON_ERROR: _ClassVar[FinishReason]
    FINISH_REASON_SHUTDOWN: _ClassVar[FinishReason]

class ReferenceKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REFERENCE_KIND_UNSPECIFIED: _ClassVar[ReferenceKind]
    REFERENCE_KIND_GOLD: _ClassVar[ReferenceKind]
    REFERENCE_KIND_TEACHER_CONSENSUS: _ClassVar[ReferenceKind]

class AnswerMatch(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ANSWER_MATCH_UNSPECIFIED: _ClassVar[AnswerMatch]
    ANSWER_MATCH_EXACT: _ClassVar[AnswerMatch]
    ANSWER_MATCH_SYMBOLIC: _ClassVar[AnswerMatch]
ROLE_UNSPECIFIED: Role
ROLE_STUDENT: Role
ROLE_TEACHER: Role
ROUTE_UNSPECIFIED: Route
ROUTE_STUDENT: Route
ROUTE_TEACHER: Route
ROUTE_BOTH: Route
ROUTE_AUTO: Route
BASIS_UNSPECIFIED: Basis
BASIS_TEMPERED: Basis
BASIS_RAW: Basis
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_CANCELLED: FinishReason
FINISH_REASON_DEADLINE: FinishReason
FINISH_REASON_ERROR: FinishReason
FINISH_REASON_SHUTDOWN: FinishReason
REFERENCE_KIND_UNSPECIFIED: ReferenceKind
REFERENCE_KIND_GOLD: ReferenceKind
REFERENCE_KIND_TEACHER_CONSENSUS: ReferenceKind
ANSWER_MATCH_UNSPECIFIED: AnswerMatch
ANSWER_MATCH_EXACT: AnswerMatch
ANSWER_MATCH_SYMBOLIC: AnswerMatch

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class ChatMessage(_message.Message):
    __slots__ = ("role", "content")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ...) -> None: ...

class ChatMessages(_message.Message):
    __slots__ = ("messages", "continue_final_message")
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    CONTINUE_FINAL_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[ChatMessage]
    continue_final_message: bool
    def __init__(self, messages: _Optional[_Iterable[_Union[ChatMessage, _Mapping]]] = ..., continue_final_message: bool = ...) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("num_samples", "temperature", "top_p", "top_k", "min_p", "max_tokens", "min_tokens", "seed", "stop", "stop_token_ids", "ignore_eos", "repetition_penalty")
    NUM_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    num_samples: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    max_tokens: int
    min_tokens: int
    seed: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    repetition_penalty: float
    def __init__(self, num_samples: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., max_tokens: _Optional[int] = ..., min_tokens: _Optional[int] = ..., seed: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: bool = ..., repetition_penalty: _Optional[float] = ...) -> None: ...

class DivergenceOptions(_message.Message):
    __slots__ = ("enabled", "basis", "per_token", "exact")
    ENABLED_FIELD_NUMBER: _ClassVar[int]
    BASIS_FIELD_NUMBER: _ClassVar[int]
    PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    EXACT_FIELD_NUMBER: _ClassVar[int]
    enabled: bool
    basis: Basis
    per_token: bool
    exact: bool
    def __init__(self, enabled: bool = ..., basis: _Optional[_Union[Basis, str]] = ..., per_token: bool = ..., exact: bool = ...) -> None: ...

class EvaluationOptions(_message.Message):
    __slots__ = ("answer_format", "reference_answer", "pass_at_k", "task", "answer_match")
    ANSWER_FORMAT_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_ANSWER_FIELD_NUMBER: _ClassVar[int]
    PASS_AT_K_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    ANSWER_MATCH_FIELD_NUMBER: _ClassVar[int]
    answer_format: str
    reference_answer: str
    pass_at_k: _containers.RepeatedScalarFieldContainer[int]
    task: str
    answer_match: AnswerMatch
    def __init__(self, answer_format: _Optional[str] = ..., reference_answer: _Optional[str] = ..., pass_at_k: _Optional[_Iterable[int]] = ..., task: _Optional[str] = ..., answer_match: _Optional[_Union[AnswerMatch, str]] = ...) -> None: ...

class OutputOptions(_message.Message):
    __slots__ = ("stream", "logprobs", "top_logprobs", "text", "processed_logprobs", "return_prompt_token_ids")
    STREAM_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    PROCESSED_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    RETURN_PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    stream: bool
    logprobs: bool
    top_logprobs: int
    text: bool
    processed_logprobs: bool
    return_prompt_token_ids: bool
    def __init__(self, stream: bool = ..., logprobs: bool = ..., top_logprobs: _Optional[int] = ..., text: bool = ..., processed_logprobs: bool = ..., return_prompt_token_ids: bool = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("request_id", "route", "prompt", "messages", "prompt_token_ids", "sampling", "divergence", "evaluation", "output", "cache_salt")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    DIVERGENCE_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    route: Route
    prompt: str
    messages: ChatMessages
    prompt_token_ids: TokenIds
    sampling: SamplingParams
    divergence: DivergenceOptions
    evaluation: EvaluationOptions
    output: OutputOptions
    cache_salt: str
    def __init__(self, request_id: _Optional[str] = ..., route: _Optional[_Union[Route, str]] = ..., prompt: _Optional[str] = ..., messages: _Optional[_Union[ChatMessages, _Mapping]] = ..., prompt_token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., divergence: _Optional[_Union[DivergenceOptions, _Mapping]] = ..., evaluation: _Optional[_Union[EvaluationOptions, _Mapping]] = ..., output: _Optional[_Union[OutputOptions, _Mapping]] = ..., cache_salt: _Optional[str] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("tokens", "complete", "agreement", "usage")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    AGREEMENT_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    tokens: TokenChunk
    complete: Complete
    agreement: Agreement
    usage: Usage
    def __init__(self, tokens: _Optional[_Union[TokenChunk, _Mapping]] = ..., complete: _Optional[_Union[Complete, _Mapping]] = ..., agreement: _Optional[_Union[Agreement, _Mapping]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ...) -> None: ...

class TokenChunk(_message.Message):
    __slots__ = ("role", "index", "position", "token_ids", "text", "logprobs", "top_logprobs")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    role: Role
    index: int
    position: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    text: str
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    top_logprobs: _containers.RepeatedCompositeFieldContainer[TopLogprobs]
    def __init__(self, role: _Optional[_Union[Role, str]] = ..., index: _Optional[int] = ..., position: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., text: _Optional[str] = ..., logprobs: _Optional[_Iterable[float]] = ..., top_logprobs: _Optional[_Iterable[_Union[TopLogprobs, _Mapping]]] = ...) -> None: ...

class TopLogprobs(_message.Message):
    __slots__ = ("entries",)
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[TopLogprob]
    def __init__(self, entries: _Optional[_Iterable[_Union[TopLogprob, _Mapping]]] = ...) -> None: ...

class TopLogprob(_message.Message):
    __slots__ = ("token_id", "logprob")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ...) -> None: ...

class Complete(_message.Message):
    __slots__ = ("sample",)
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    sample: Sample
    def __init__(self, sample: _Optional[_Union[Sample, _Mapping]] = ...) -> None: ...

class Sample(_message.Message):
    __slots__ = ("role", "index", "text", "token_ids", "logprobs", "finish_reason", "answer", "correct", "divergence", "timings", "error", "divergence_error", "top_logprobs", "processed_logprobs", "text_ends")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    CORRECT_FIELD_NUMBER: _ClassVar[int]
    DIVERGENCE_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    DIVERGENCE_ERROR_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROCESSED_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TEXT_ENDS_FIELD_NUMBER: _ClassVar[int]
    role: Role
    index: int
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    finish_reason: FinishReason
    answer: str
    correct: bool
    divergence: Divergence
    timings: Timings
    error: str
    divergence_error: str
    top_logprobs: _containers.RepeatedCompositeFieldContainer[TopLogprobs]
    processed_logprobs: _containers.RepeatedScalarFieldContainer[float]
    text_ends: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, role: _Optional[_Union[Role, str]] = ..., index: _Optional[int] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[float]] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., answer: _Optional[str] = ..., correct: bool = ..., divergence: _Optional[_Union[Divergence, _Mapping]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., error: _Optional[str] = ..., divergence_error: _Optional[str] = ..., top_logprobs: _Optional[_Iterable[_Union[TopLogprobs, _Mapping]]] = ..., processed_logprobs: _Optional[_Iterable[float]] = ..., text_ends: _Optional[_Iterable[int]] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("queue_s", "prefill_s", "ttft_s", "decode_s")
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    TTFT_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_S_FIELD_NUMBER: _ClassVar[int]
    queue_s: float
    prefill_s: float
    ttft_s: float
    decode_s: float
    def __init__(self, queue_s: _Optional[float] = ..., prefill_s: _Optional[float] = ..., ttft_s: _Optional[float] = ..., decode_s: _Optional[float] = ...) -> None: ...

class Divergence(_message.Message):
    __slots__ = ("policy", "reference", "basis", "num_tokens", "k1_sum", "k2_sum", "k3_sum", "k1_mean", "k2_mean", "k3_mean", "exact_mean", "argmax_agreement", "predicted_acceptance", "per_token_k3", "reference_logprobs", "max_abs_log_ratio", "truncated", "nonfinite_tokens", "large_ratio_tokens")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    BASIS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    K1_SUM_FIELD_NUMBER: _ClassVar[int]
    K2_SUM_FIELD_NUMBER: _ClassVar[int]
    K3_SUM_FIELD_NUMBER: _ClassVar[int]
    K1_MEAN_FIELD_NUMBER: _ClassVar[int]
    K2_MEAN_FIELD_NUMBER: _ClassVar[int]
    K3_MEAN_FIELD_NUMBER: _ClassVar[int]
    EXACT_MEAN_FIELD_NUMBER: _ClassVar[int]
    ARGMAX_AGREEMENT_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_ACCEPTANCE_FIELD_NUMBER: _ClassVar[int]
    PER_TOKEN_K3_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    MAX_ABS_LOG_RATIO_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    NONFINITE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LARGE_RATIO_TOKENS_FIELD_NUMBER: _ClassVar[int]
    policy: Role
    reference: Role
    basis: Basis
    num_tokens: int
    k1_sum: float
    k2_sum: float
    k3_sum: float
    k1_mean: float
    k2_mean: float
    k3_mean: float
    exact_mean: float
    argmax_agreement: float
    predicted_acceptance: float
    per_token_k3: _containers.RepeatedScalarFieldContainer[float]
    reference_logprobs: _containers.RepeatedScalarFieldContainer[float]
    max_abs_log_ratio: float
    truncated: bool
    nonfinite_tokens: int
    large_ratio_tokens: int
    def __init__(self, policy: _Optional[_Union[Role, str]] = ..., reference: _Optional[_Union[Role, str]] = ..., basis: _Optional[_Union[Basis, str]] = ..., num_tokens: _Optional[int] = ..., k1_sum: _Optional[float] = ..., k2_sum: _Optional[float] = ..., k3_sum: _Optional[float] = ..., k1_mean: _Optional[float] = ..., k2_mean: _Optional[float] = ..., k3_mean: _Optional[float] = ..., exact_mean: _Optional[float] = ..., argmax_agreement: _Optional[float] = ..., predicted_acceptance: _Optional[float] = ..., per_token_k3: _Optional[_Iterable[float]] = ..., reference_logprobs: _Optional[_Iterable[float]] = ..., max_abs_log_ratio: _Optional[float] = ..., truncated: bool = ..., nonfinite_tokens: _Optional[int] = ..., large_ratio_tokens: _Optional[int] = ...) -> None: ...

class Vote(_message.Message):
    __slots__ = ("answer", "share", "num_valid", "num_samples", "tie")
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    NUM_VALID_FIELD_NUMBER: _ClassVar[int]
    NUM_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    TIE_FIELD_NUMBER: _ClassVar[int]
    answer: str
    share: float
    num_valid: int
    num_samples: int
    tie: bool
    def __init__(self, answer: _Optional[str] = ..., share: _Optional[float] = ..., num_valid: _Optional[int] = ..., num_samples: _Optional[int] = ..., tie: bool = ...) -> None: ...

class Agreement(_message.Message):
    __slots__ = ("student", "teacher", "same_answer", "student_pass_at_k", "teacher_pass_at_k", "reference_kind")
    class StudentPassAtKEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    class TeacherPassAtKEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    STUDENT_FIELD_NUMBER: _ClassVar[int]
    TEACHER_FIELD_NUMBER: _ClassVar[int]
    SAME_ANSWER_FIELD_NUMBER: _ClassVar[int]
    STUDENT_PASS_AT_K_FIELD_NUMBER: _ClassVar[int]
    TEACHER_PASS_AT_K_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_KIND_FIELD_NUMBER: _ClassVar[int]
    student: Vote
    teacher: Vote
    same_answer: bool
    student_pass_at_k: _containers.ScalarMap[int, float]
    teacher_pass_at_k: _containers.ScalarMap[int, float]
    reference_kind: ReferenceKind
    def __init__(self, student: _Optional[_Union[Vote, _Mapping]] = ..., teacher: _Optional[_Union[Vote, _Mapping]] = ..., same_answer: bool = ..., student_pass_at_k: _Optional[_Mapping[int, float]] = ..., teacher_pass_at_k: _Optional[_Mapping[int, float]] = ..., reference_kind: _Optional[_Union[ReferenceKind, str]] = ...) -> None: ...

class RoleUsage(_message.Message):
    __slots__ = ("role", "prompt_tokens", "cached_prompt_tokens", "completion_tokens", "prompt_token_ids")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    role: Role
    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, role: _Optional[_Union[Role, str]] = ..., prompt_tokens: _Optional[int] = ..., cached_prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("request_id", "seed", "roles", "seconds")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    ROLES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    seed: int
    roles: _containers.RepeatedCompositeFieldContainer[RoleUsage]
    seconds: float
    def __init__(self, request_id: _Optional[str] = ..., seed: _Optional[int] = ..., roles: _Optional[_Iterable[_Union[RoleUsage, _Mapping]]] = ..., seconds: _Optional[float] = ...) -> None: ...

class CompareRequest(_message.Message):
    __slots__ = ("request_id", "prompt", "messages", "prompt_token_ids", "sampling", "divergence", "evaluation", "output", "cache_salt")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    DIVERGENCE_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    prompt: str
    messages: ChatMessages
    prompt_token_ids: TokenIds
    sampling: SamplingParams
    divergence: DivergenceOptions
    evaluation: EvaluationOptions
    output: OutputOptions
    cache_salt: str
    def __init__(self, request_id: _Optional[str] = ..., prompt: _Optional[str] = ..., messages: _Optional[_Union[ChatMessages, _Mapping]] = ..., prompt_token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., divergence: _Optional[_Union[DivergenceOptions, _Mapping]] = ..., evaluation: _Optional[_Union[EvaluationOptions, _Mapping]] = ..., output: _Optional[_Union[OutputOptions, _Mapping]] = ..., cache_salt: _Optional[str] = ...) -> None: ...

class CompareResponse(_message.Message):
    __slots__ = ("samples", "agreement", "usage")
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    AGREEMENT_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    samples: _containers.RepeatedCompositeFieldContainer[Sample]
    agreement: Agreement
    usage: Usage
    def __init__(self, samples: _Optional[_Iterable[_Union[Sample, _Mapping]]] = ..., agreement: _Optional[_Union[Agreement, _Mapping]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ...) -> None: ...

class Completion(_message.Message):
    __slots__ = ("token_ids", "text")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    token_ids: TokenIds
    text: str
    def __init__(self, token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., text: _Optional[str] = ...) -> None: ...

class ScoreRequest(_message.Message):
    __slots__ = ("request_id", "prompt", "messages", "prompt_token_ids", "completions", "roles", "temperature", "divergence", "cache_salt", "return_prompt_token_ids")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    COMPLETIONS_FIELD_NUMBER: _ClassVar[int]
    ROLES_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    DIVERGENCE_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    RETURN_PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    prompt: str
    messages: ChatMessages
    prompt_token_ids: TokenIds
    completions: _containers.RepeatedCompositeFieldContainer[Completion]
    roles: _containers.RepeatedScalarFieldContainer[Role]
    temperature: float
    divergence: DivergenceOptions
    cache_salt: str
    return_prompt_token_ids: bool
    def __init__(self, request_id: _Optional[str] = ..., prompt: _Optional[str] = ..., messages: _Optional[_Union[ChatMessages, _Mapping]] = ..., prompt_token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., completions: _Optional[_Iterable[_Union[Completion, _Mapping]]] = ..., roles: _Optional[_Iterable[_Union[Role, str]]] = ..., temperature: _Optional[float] = ..., divergence: _Optional[_Union[DivergenceOptions, _Mapping]] = ..., cache_salt: _Optional[str] = ..., return_prompt_token_ids: bool = ...) -> None: ...

class Score(_message.Message):
    __slots__ = ("role", "index", "token_ids", "logprobs", "sum_logprob", "divergence", "is_greedy")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    SUM_LOGPROB_FIELD_NUMBER: _ClassVar[int]
    DIVERGENCE_FIELD_NUMBER: _ClassVar[int]
    IS_GREEDY_FIELD_NUMBER: _ClassVar[int]
    role: Role
    index: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    sum_logprob: float
    divergence: Divergence
    is_greedy: _containers.RepeatedScalarFieldContainer[bool]
    def __init__(self, role: _Optional[_Union[Role, str]] = ..., index: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[float]] = ..., sum_logprob: _Optional[float] = ..., divergence: _Optional[_Union[Divergence, _Mapping]] = ..., is_greedy: _Optional[_Iterable[bool]] = ...) -> None: ...

class ScoreResponse(_message.Message):
    __slots__ = ("scores", "usage")
    SCORES_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    scores: _containers.RepeatedCompositeFieldContainer[Score]
    usage: Usage
    def __init__(self, scores: _Optional[_Iterable[_Union[Score, _Mapping]]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ...) -> None: ...

class GetModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("role", "backend", "device", "precision", "num_parameters", "vocab_size", "max_model_len", "max_num_seqs", "tokenizer_hash", "bundle_id", "manifest_sha256", "path_noise_nats", "batch_noise_nats", "backend_noise_nats", "address", "batch_invariant")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    NUM_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SEQS_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_HASH_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_ID_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_SHA256_FIELD_NUMBER: _ClassVar[int]
    PATH_NOISE_NATS_FIELD_NUMBER: _ClassVar[int]
    BATCH_NOISE_NATS_FIELD_NUMBER: _ClassVar[int]
    BACKEND_NOISE_NATS_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    BATCH_INVARIANT_FIELD_NUMBER: _ClassVar[int]
    role: Role
    backend: str
    device: str
    precision: str
    num_parameters: int
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    tokenizer_hash: str
    bundle_id: str
    manifest_sha256: str
    path_noise_nats: float
    batch_noise_nats: float
    backend_noise_nats: float
    address: str
    batch_invariant: bool
    def __init__(self, role: _Optional[_Union[Role, str]] = ..., backend: _Optional[str] = ..., device: _Optional[str] = ..., precision: _Optional[str] = ..., num_parameters: _Optional[int] = ..., vocab_size: _Optional[int] = ..., max_model_len: _Optional[int] = ..., max_num_seqs: _Optional[int] = ..., tokenizer_hash: _Optional[str] = ..., bundle_id: _Optional[str] = ..., manifest_sha256: _Optional[str] = ..., path_noise_nats: _Optional[float] = ..., batch_noise_nats: _Optional[float] = ..., backend_noise_nats: _Optional[float] = ..., address: _Optional[str] = ..., batch_invariant: bool = ...) -> None: ...
