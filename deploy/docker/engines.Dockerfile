# The encoder and language engines. The wheels of torch bring CUDA along; the host needs its driver and NVIDIA's
# container toolkit alone. For machines without a GPU: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu
#   docker build --file deploy/docker/engines.Dockerfile --tag triptych-engines .
#   docker run --gpus device=0 --volume /models:/models:ro --publish 8001:8001 triptych-engines \
#     encoder --model /models/Qwen3-VL-4B-Instruct --device cuda:0 --port 8001
ARG PYTHON=3.11

FROM python:${PYTHON}-slim-bookworm AS build
ARG TORCH_INDEX=https://pypi.org/simple
WORKDIR /src
COPY requirements.lock pyproject.toml README.md LICENSE ./
# torch first and alone: gigabytes that change with the lock, not with the code
RUN python -m venv /opt/triptych \
    && /opt/triptych/bin/pip install --no-cache-dir --index-url "${TORCH_INDEX}" --extra-index-url https://pypi.org/simple \
        --constraint requirements.lock torch
COPY proxy proxy
COPY engines engines
COPY deploy deploy
COPY bench bench
RUN /opt/triptych/bin/pip install --no-cache-dir --constraint requirements.lock '.[engines,mooncake]'

FROM python:${PYTHON}-slim-bookworm
# what Mooncake's wheel loads; hadolint's pins of Debian packages break with every point release
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends --yes ibverbs-providers libcurl4 libibverbs1 libnuma1 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/triptych /opt/triptych
# Every address: other containers ask. The device and the driver's libraries are the toolkit's business.
ENV PATH=/opt/triptych/bin:$PATH PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 HOME=/tmp \
    TRIPTYCH_HOST=0.0.0.0 NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 65532:65532
EXPOSE 8100
ENTRYPOINT ["triptych"]
CMD ["language", "--help"]
