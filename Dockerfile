# SPDX-License-Identifier: Apache-2.0
# One image for all services; the command says which (soci-snapshotter-grpc, soci-mounter, soci-fetcher, soci-indexer,
# soci). No instruction needs BuildKit, so every builder can read it:
#   docker build -t sociable:dev .

# --- build: everything becomes a wheel; whatever comes from an index is checked against a hash ---
FROM debian:bookworm-slim AS build

# For networks with an index or a proxy of their own; unset they are not there. They stay in this stage.
ARG PIP_INDEX_URL
ARG PIP_DEFAULT_TIMEOUT

RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      ca-certificates gcc libc6-dev libfuse3-dev pkg-config python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY requirements-build.lock requirements.lock ./

# pyfuse3 comes as source only. Without build isolation its build uses these tools and fetches none of its own.
RUN python3 -m venv /opt/build \
 && /opt/build/bin/pip install --no-cache-dir --require-hashes --only-binary :all: -r requirements-build.lock
RUN /opt/build/bin/pip wheel --no-cache-dir --require-hashes --no-deps --only-binary :all: --no-binary pyfuse3 \
      --no-build-isolation --wheel-dir /wheels -r requirements.lock

# Our own packages last: they change most often.
COPY LICENSE README.md pyproject.toml ./
COPY proto proto
COPY libs libs
COPY services services
RUN /opt/build/bin/pip wheel --no-index --no-deps --no-build-isolation --wheel-dir /wheels . \
 && python3 -m venv --without-pip /opt/sociable \
 && /opt/build/bin/pip --python /opt/sociable/bin/python install --no-index --no-deps /wheels/*.whl

# --- the image: Debian's Python, libfuse, and one virtual environment ---
FROM debian:bookworm-slim

RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends ca-certificates fuse3 libfuse3-3 python3 \
 && rm -rf /var/lib/apt/lists/*

COPY --from=build /opt/sociable /opt/sociable
ENV PATH=/opt/sociable/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin

CMD ["soci", "--help"]
