# Tandem's images. DEVICE is cpu or gpu; ROLE is serve, or export for the distillation job, whose
# image has the packages for training and conversion as well. docs/container.md says how to build and
# run them; scripts/build_image does it without a Docker daemon, and proves what the page says.
#
# The secrets are for a build behind a mirror: a pip.conf, and the certificates to trust. A secret
# is there for its RUN alone, where a build argument would stay readable in the image's history.
ARG DEVICE=cpu
ARG BASE_IMAGE=docker.io/library/python:3.11.16-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b
ARG GPU_BASE_IMAGE=docker.io/nvidia/cuda:13.0.2-cudnn-runtime-ubuntu24.04@sha256:14d94b039cb94bbd5da559f303b46bc4b0d5d6c24ab1a9d7b186e566ed3400dc

FROM ${BASE_IMAGE} AS cpu-base

FROM ${GPU_BASE_IMAGE} AS gpu-base
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates=20* python3=3.* \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log

FROM ${DEVICE}-base AS base
RUN groupadd --gid 10001 tandem \
    && useradd --uid 10001 --gid 10001 --no-log-init --no-create-home --home-dir /tmp tandem

FROM base AS packages
# Ubuntu's Python comes without it.
RUN python3 -m ensurepip --version || { apt-get update \
    && apt-get install --yes --no-install-recommends python3-venv=3.* \
    && rm -rf /var/lib/apt/lists/*; }
ARG DEVICE=cpu
ARG ROLE=serve
ARG TORCH=torch
ARG TORCH_INDEX
WORKDIR /src
COPY pyproject.toml constraints.txt scripts/image/install_packages ./
RUN --mount=type=secret,id=pip --mount=type=secret,id=ca ./install_packages "$ROLE" "$DEVICE"

FROM packages AS app
COPY . .
RUN --mount=type=secret,id=pip --mount=type=secret,id=ca scripts/image/install_tandem

FROM base AS image
COPY --from=packages /opt/tandem /opt/tandem
COPY --from=app /app /opt/tandem
ENV PATH=/opt/tandem/bin:$PATH \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    ORT_DISABLE_TELEMETRY=1 \
    TANDEM_BUNDLE=/bundle \
    TANDEM_READY_FILE=/tmp/tandem-ready.json
ARG DEVICE=cpu
ARG ROLE=serve
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Tandem (${ROLE}, ${DEVICE})" \
    org.opencontainers.image.description="Serves a distilled student beside its teacher" \
    org.opencontainers.image.version="0.1.0" \
    org.opencontainers.image.revision="${REVISION}"
USER 10001:10001
WORKDIR /opt/tandem
EXPOSE 50051 50052 9464
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=300s --interval=10s --timeout=5s --retries=3 CMD ["tandem-healthcheck"]
ENTRYPOINT ["tandem"]
CMD ["serve"]
