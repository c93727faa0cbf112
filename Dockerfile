# The gateway, and in it the embedded Postgres and Valkey: alone it is complete, with DATABASE_URL and REDIS_URL it
# starts neither.

FROM python:3.11-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /source
# Dependencies first, by hash: this layer is kept until a lock changes.
COPY requirements.lock requirements-build.lock ./
RUN python -m venv /opt/gateway \
 && /opt/gateway/bin/pip install --require-hashes -r requirements.lock \
 && python -m venv /opt/build \
 && /opt/build/bin/pip install --require-hashes -r requirements-build.lock
COPY pyproject.toml README.md ./
COPY gateway gateway
COPY sql sql
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /dist . \
 && /opt/gateway/bin/pip install --no-deps --no-index /dist/*.whl

FROM python:3.11-slim-bookworm
# initdb wants its user to have a name.
RUN useradd --system --uid 10001 --create-home --home-dir /var/lib/ai-gateway gateway
COPY --from=build /opt/gateway /opt/gateway
ENV PATH=/opt/gateway/bin:$PATH PYTHONUNBUFFERED=1 HOST=0.0.0.0 PORT=3000 GATEWAY_DATA_DIR=/var/lib/ai-gateway/data
USER 10001
WORKDIR /var/lib/ai-gateway
VOLUME /var/lib/ai-gateway
EXPOSE 3000
# Open streams go on for GATEWAY_DRAIN_TIMEOUT, 110 seconds, after this signal: give the container 120 to stop.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 CMD ["python", "-c", \
    "import os, urllib.request as r; r.urlopen(f\"http://127.0.0.1:{os.environ['PORT']}/health/live\", timeout=4)"]
ENTRYPOINT ["gateway"]
CMD ["serve"]
