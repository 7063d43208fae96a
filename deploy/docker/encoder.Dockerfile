# The encoder service. Build from the repository's root:
#   docker build -f deploy/docker/encoder.Dockerfile -t hashlens-encoder:0.1.0 .
ARG PYTHON=3.11

FROM python:${PYTHON}-slim-bookworm AS base

# What it depends on, apart from our own code: these layers, gigabytes of them, stay as they are while
# only that changes. PyTorch's wheels carry CUDA; nothing else of it is needed but the driver, which
# the container runtime mounts.
FROM base AS dependencies
# Another index than pip's own, and one beside it, such as PyTorch's for CPUs, whose wheels have no
# CUDA. Both are seen in the image's history: no passwords.
ARG PIP_INDEX_URL=""
ARG PIP_EXTRA_INDEX_URL=""
# pip is the base image's: the virtual environment, which is all that is kept, does without.
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_PYTHON=/opt/venv/bin/python VIRTUAL_ENV=/opt/venv
WORKDIR /build
RUN python -m venv --without-pip /opt/venv
COPY pyproject.toml README.md constraints.txt ./
# Our own packages are empty here, and taken out again.
RUN mkdir hashlens encoder_service search_service \
    && pip install -c constraints.txt '.[encoder,otel]' \
    && pip uninstall -y hashlens

FROM dependencies AS package
COPY LICENSE ./
COPY hashlens hashlens
COPY encoder_service encoder_service
COPY search_service search_service
RUN pip install --no-deps --target /opt/hashlens .

FROM base
ARG VERSION=0.1.0
ARG REVISION=""
ARG SOURCE=""
LABEL org.opencontainers.image.title="hashlens-encoder" \
    org.opencontainers.image.description="Finds images by learned binary codes: image bytes in, codes and features out" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.source="${SOURCE}" \
    org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 10001 hashlens \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent \
    --shell /usr/sbin/nologin hashlens
COPY --chmod=0644 deploy/docker/probe.py /opt/probe.py
COPY --from=dependencies /opt/venv /opt/venv
COPY --from=package /opt/hashlens /opt/hashlens
# Listening where others reach it needs a certificate, or --insecure: without either it says so and
# ends. The driver's libraries that are mounted where a GPU is given; which GPUs is not for an image.
ENV PATH=/opt/venv/bin:/opt/hashlens/bin:$PATH PYTHONPATH=/opt/hashlens \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    HASHLENS_ENCODER_LISTEN=0.0.0.0:50051 \
    HASHLENS_ENCODER_HEALTH_LISTEN=0.0.0.0:50071
# Nothing is written but /tmp, and that only by `--compile`. A model of your own is mounted anywhere,
# and named by HASHLENS_ENCODER_CHECKPOINT.
WORKDIR /tmp
USER 10001:10001
# Calls, metrics (--metrics-listen), health.
EXPOSE 50051 50061 50071
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "/opt/probe.py", "127.0.0.1:50071", "readiness"]
ENTRYPOINT ["python", "-m", "encoder_service"]
