"""The remote teacher at the start of a server: its credentials, and a first look at it."""

from __future__ import annotations

import logging

import grpc

from bundle.errors import UserError
from bundle.manifest import TeacherReference
from protos.tandem.v1 import inference_pb2 as pb
from protos.tandem.v1.inference_pb2_grpc import InferenceServiceStub
from serve.addresses import RemoteAddress
from serve.app.config import ServeConfig
from serve.client.access import read_token
from serve.client.channel import Endpoint, Tls
from serve.client.failures import explain
from serve.metrics.server_metrics import ServerMetrics
from serve.pair.remote_teacher import RemoteTeacher, teacher_of
from serve.pair.served import Role, ServedModel

logger = logging.getLogger(__name__)

FIRST_LOOK_TIMEOUT_S = 3.0
# A failed call costs the answer that waits for it no more than the pause before a second attempt.
_MAX_ATTEMPTS = 2


def reach_teacher(
    config: ServeConfig,
    address: RemoteAddress,
    reference: TeacherReference,
    student: ServedModel,
    metrics: ServerMetrics,
) -> ServedModel:
    """Return the teacher that another server has, whether that is there already or not.

    Raises:
        UserError: it is there and cannot be this student's teacher, or the credentials for it
            cannot be read.
    """
    engine = RemoteTeacher(
        str(address),
        lambda: open_endpoint(config, address),
        tokenizer_hash=student.tokenizer.hash,
        scoring_timeout_s=config.teacher_timeout_s,
        on_call=lambda rpc, code: metrics.remote_calls.labels(rpc, code).inc(),
    )
    model = _look(open_endpoint(config, address), engine)
    if model is not None and model.num_parameters != reference.num_parameters:
        logger.warning(
            "the teacher at %s has %d parameters, the one that the student was distilled from (%s) "
            "has %d: divergences are from this other model",
            *(address, model.num_parameters, reference.source, reference.num_parameters),
        )
    num_tokens = student.engine.info.vocab_size
    if model is not None and model.vocab_size != num_tokens:
        logger.warning(
            "the teacher at %s has logits of %d tokens, the student of %d: log-probabilities are "
            "normalised over different tokens; an older Tandem counts the rows that pad a head",
            *(address, model.vocab_size, num_tokens),
        )
    return ServedModel(Role.TEACHER, engine, student.tokenizer, address=str(address))


def open_endpoint(config: ServeConfig, address: RemoteAddress) -> Endpoint:
    """Read the credentials. UserError: a file of them cannot be read."""
    token = read_token(config.teacher_token_file, "--teacher-token-file")
    tls = None
    if address.is_encrypted:
        tls = Tls(config.teacher_tls_ca, config.teacher_tls_cert, config.teacher_tls_key)
    return Endpoint(address.target, token, tls, _MAX_ATTEMPTS)


def _look(endpoint: Endpoint, engine: RemoteTeacher) -> pb.Model | None:
    """Return what the server says of its teacher; None when it does not answer.

    Raises:
        UserError: it has no teacher, or one with another tokenizer.
    """
    try:
        channel = endpoint.open()
    except OSError as error:
        raise UserError(f"--teacher {engine.address}: {error}") from None
    with channel:
        try:
            models = InferenceServiceStub(channel).GetModels(
                pb.GetModelsRequest(), timeout=FIRST_LOOK_TIMEOUT_S, metadata=endpoint.metadata()
            )
        except grpc.RpcError as error:
            logger.warning(
                "the teacher at %s does not answer (%s): until it does, the student is alone",
                engine.address,
                " ".join(explain(error).split()),
            )
            return None
    try:
        return teacher_of(models, engine.tokenizer_hash)
    except UserError as error:
        raise UserError(f"--teacher {engine.address}: {error}") from None
