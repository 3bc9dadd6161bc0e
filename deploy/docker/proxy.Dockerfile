# The proxy alone: no torch, no compiler, nobody's root.
#   docker build --file deploy/docker/proxy.Dockerfile --tag triptych-proxy .
#   docker run --publish 8000:8000 --env TRIPTYCH_DECODE_SERVERS_URLS=http://pd:8002 triptych-proxy
ARG PYTHON=3.11

FROM python:${PYTHON}-slim-bookworm AS build
WORKDIR /src
COPY requirements.lock pyproject.toml README.md LICENSE ./
COPY proxy proxy
COPY engines engines
COPY deploy deploy
COPY bench bench
RUN python -m venv /opt/triptych \
    && /opt/triptych/bin/pip install --no-cache-dir --no-compile --constraint requirements.lock '.[tracing]'

FROM python:${PYTHON}-slim-bookworm
COPY --from=build /opt/triptych /opt/triptych
ENV PATH=/opt/triptych/bin:$PATH PYTHONUNBUFFERED=1
USER 65532:65532
EXPOSE 8000
# Alive, not ready: a proxy without engines is no reason to restart it. Load balancers ask /ready.
HEALTHCHECK --interval=5s --timeout=3s --start-period=10s CMD ["python", "-c", "\
import os, urllib.request as http; \
http.urlopen(f'http://127.0.0.1:{os.environ.get(\"TRIPTYCH_PORT\", 8000)}/health', timeout=2)"]
ENTRYPOINT ["triptych"]
CMD ["proxy"]
