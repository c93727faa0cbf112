# The gateway, without a Postgres and a Valkey: DATABASE_URL and REDIS_URL say where they are.
#
#   docker build --build-arg PYTHON=python:3.11-slim-bookworm@sha256:… .    the base image by its digest
#   docker run --read-only --cap-drop ALL … ai-gateway                      all that it writes is in its one volume

# checkov:skip=CKV_DOCKER_7: it looks for a tag behind FROM, and PYTHON has one
ARG PYTHON=python:3.11-slim-bookworm

FROM ${PYTHON} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /source
# Dependencies first: this layer is kept until a lock changes. Wheels, each by its hash; of the one package that has none
# a wheel is made here, without isolation, so that nothing is fetched that no lock names.
COPY requirements.lock requirements-build.lock ./
RUN pip install --require-hashes --only-binary :all: -r requirements-build.lock \
 && pip wheel --require-hashes --only-binary :all: --no-binary quantile-python --no-build-isolation \
    --wheel-dir /wheels -r requirements.lock
COPY pyproject.toml README.md ./
COPY gateway gateway
COPY sql sql
# Of those wheels only what the gateway itself asks for, and neither pip nor setuptools. The bytecode is not compared
# with its source: both are read-only.
RUN pip wheel --no-deps --no-index --no-build-isolation --wheel-dir /wheels . \
 && python -m venv --without-pip /opt/gateway \
 && pip --python /opt/gateway/bin/python install --no-index --find-links /wheels --no-compile /wheels/ai_gateway-*.whl \
 && python -m compileall -q --invalidation-mode unchecked-hash /opt/gateway/lib
# The bill of materials is made of what is installed, and lies where scanners look for one.
COPY scripts/bill.py ./
RUN /opt/gateway/bin/python bill.py > /opt/gateway/sbom.cdx.json

FROM ${PYTHON}
# The packages of the base image are pip and what it needs.
RUN groupadd --gid 10001 gateway \
 && useradd --uid 10001 --gid gateway --no-log-init --no-create-home --home-dir /var/lib/ai-gateway \
    --shell /usr/sbin/nologin gateway \
 && install --directory --owner gateway --group gateway --mode 0700 /var/lib/ai-gateway \
 && rm -rf /usr/local/lib/python3.*/site-packages /usr/local/bin/pip*
COPY --from=build /opt/gateway /opt/gateway
ENV PATH=/opt/gateway/bin:$PATH
# Imported once: the base image has no bytecode of Python's own modules. A VERSION that is given has to be the source's.
ARG VERSION=""
RUN python -c "import gateway.__main__, gateway.serve, gateway.supervisor" \
 && { test -z "$VERSION" || test "$(gateway --version)" = "gateway $VERSION"; }
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOST=0.0.0.0 PORT=3000 \
    GATEWAY_DATA_DIR=/var/lib/ai-gateway/data TMPDIR=/var/lib/ai-gateway
USER 10001
WORKDIR /var/lib/ai-gateway
VOLUME /var/lib/ai-gateway
EXPOSE 3000
# Open streams go on for GATEWAY_DRAIN_TIMEOUT, 110 seconds, after this signal, and last rows take up to 21: give the container 135.
STOPSIGNAL SIGTERM
# By a socket: an HTTP client takes three times the CPU to import, and may ask a proxy.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 CMD ["python", "-ISc", \
    "import os, socket; s = socket.create_connection(('127.0.0.1', os.environ['PORT']), 4); s.sendall(b'GET /health/live HTTP/1.0\\r\\n\\r\\n'); raise SystemExit(b' 200 ' not in s.recv(64))"]
ENTRYPOINT ["gateway"]
CMD ["serve"]
ARG REVISION=""
ARG SOURCE=""
LABEL org.opencontainers.image.title="AI Gateway" \
      org.opencontainers.image.description="One OpenAI-compatible base URL in front of OpenAI, Anthropic, Ollama and every compatible server" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.source="$SOURCE"
