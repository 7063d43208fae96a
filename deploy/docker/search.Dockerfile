# The search service. Build from the repository's root:
#   docker build -f deploy/docker/search.Dockerfile -t hashlens-search:0.1.0 .
ARG PYTHON=3.11

FROM python:${PYTHON}-slim-bookworm AS base

# What it depends on, apart from our own code: these layers stay as they are while only that changes.
FROM base AS dependencies
# Another index than pip's own, and one beside it. Both are seen in the image's history: no passwords.
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
    && pip install -c constraints.txt '.[search,otel]' \
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
LABEL org.opencontainers.image.title="hashlens-search" \
    org.opencontainers.image.description="Finds images by learned binary codes: codes and features in, nearest items out" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.source="${SOURCE}" \
    org.opencontainers.image.licenses="Apache-2.0"
# OpenMP for the kernels. Debian keeps no old versions, so a pinned one could not be built for long.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/*
RUN groupadd --gid 10001 hashlens \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent \
    --shell /usr/sbin/nologin hashlens \
    && install -d -o 10001 -g 10001 -m 0700 /var/lib/hashlens
COPY --chmod=0644 deploy/docker/probe.py /opt/probe.py
COPY --from=dependencies /opt/venv /opt/venv
COPY --from=package /opt/hashlens /opt/hashlens
# Listening where others reach it needs a certificate, or --insecure: without either it says so and
# ends. Kernels are compiled for the CPU at the first start on a volume, and kept there: a cache that
# cannot be written is not read either, and one made where the image is built fits no other CPU.
ENV PATH=/opt/venv/bin:/opt/hashlens/bin:$PATH PYTHONPATH=/opt/hashlens \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    NUMBA_CACHE_DIR=/var/lib/hashlens/kernels \
    HASHLENS_SEARCH_DATA_DIR=/var/lib/hashlens/data \
    HASHLENS_SEARCH_LISTEN=0.0.0.0:50052 \
    HASHLENS_SEARCH_HEALTH_LISTEN=0.0.0.0:50072
WORKDIR /var/lib/hashlens
# All that is written: this, and /tmp.
VOLUME ["/var/lib/hashlens"]
USER 10001:10001
# Calls, metrics (--metrics-listen), health.
EXPOSE 50052 50062 50072
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python", "/opt/probe.py", "127.0.0.1:50072", "readiness"]
ENTRYPOINT ["python", "-m", "search_service"]
