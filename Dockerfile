# vlbench in a container, for the CPU unless another package index of torch is named:
#   docker build -t vlbench .
#   docker build -t vlbench:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
#   docker run --rm -v "$PWD/runs:/work/runs" vlbench fit recipe=yivl_llava
# The folder that is mounted must be writable for user 1000 (or say --user "$(id -u)").
FROM python:3.12-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 HOME=/work

# torch first: a change of vlbench's sources does not fetch it again
RUN pip install torch torchvision --index-url "$TORCH_INDEX"

COPY . /source
RUN pip install /source && useradd --uid 1000 --home-dir /work vlbench \
    && mkdir -p /work/runs && chown -R vlbench /work

USER vlbench
WORKDIR /work
ENTRYPOINT ["python", "-m", "vlbench"]
CMD ["--help"]
