# Tandem's images, `cpu` (the default) and `gpu`. docs/container.md says how to build and run them;
# scripts/build_image does it without a Docker daemon, and proves what the page says.
#
# The secrets are for a build behind a mirror: a pip.conf, and the certificates to trust. A secret
# is there for its RUN alone, where a build argument would stay readable in the image's history.
ARG BASE_IMAGE=docker.io/library/python:3.11.16-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b
ARG GPU_BASE_IMAGE=docker.io/nvidia/cuda:13.0.2-cudnn-runtime-ubuntu24.04@sha256:14d94b039cb94bbd5da559f303b46bc4b0d5d6c24ab1a9d7b186e566ed3400dc

# --- gpu -----------------------------------------------------------------------------------------
FROM ${GPU_BASE_IMAGE} AS gpu-base
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates=20* python3=3.* \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log \
    && groupadd --gid 10001 tandem \
    && useradd --uid 10001 --gid 10001 --no-log-init --no-create-home --home-dir /tmp tandem

FROM gpu-base AS gpu-packages
RUN apt-get update && apt-get install --yes --no-install-recommends python3-venv=3.* \
    && rm -rf /var/lib/apt/lists/*
ARG TORCH=torch
ARG TORCH_INDEX=https://download.pytorch.org/whl/cu130
WORKDIR /src
COPY pyproject.toml constraints.txt scripts/image/install_packages ./
RUN --mount=type=secret,id=pip --mount=type=secret,id=ca ./install_packages gpu

FROM gpu-packages AS gpu-tandem
COPY . .
RUN --mount=type=secret,id=pip --mount=type=secret,id=ca scripts/image/install_tandem

FROM gpu-base AS gpu
COPY --from=gpu-packages /opt/tandem /opt/tandem
COPY --from=gpu-tandem /app /opt/tandem
ENV PATH=/opt/tandem/bin:$PATH \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    ORT_DISABLE_TELEMETRY=1 \
    TANDEM_BUNDLE=/bundle \
    TANDEM_READY_FILE=/tmp/tandem-ready.json
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Tandem (gpu)" \
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

# --- cpu -----------------------------------------------------------------------------------------
FROM ${BASE_IMAGE} AS cpu-base
RUN groupadd --gid 10001 tandem \
    && useradd --uid 10001 --gid 10001 --no-log-init --no-create-home --home-dir /tmp tandem

FROM cpu-base AS cpu-packages
ARG TORCH=torch
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /src
COPY pyproject.toml constraints.txt scripts/image/install_packages ./
RUN --mount=type=secret,id=pip --mount=type=secret,id=ca ./install_packages cpu

FROM cpu-packages AS cpu-tandem
COPY . .
RUN --mount=type=secret,id=pip --mount=type=secret,id=ca scripts/image/install_tandem

FROM cpu-base AS cpu
COPY --from=cpu-packages /opt/tandem /opt/tandem
COPY --from=cpu-tandem /app /opt/tandem
ENV PATH=/opt/tandem/bin:$PATH \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    ORT_DISABLE_TELEMETRY=1 \
    TANDEM_BUNDLE=/bundle \
    TANDEM_READY_FILE=/tmp/tandem-ready.json
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Tandem (cpu)" \
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
