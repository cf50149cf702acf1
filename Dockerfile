# Not built by us yet: where it fails, the two commands of README.md are what was tried.
#
# docker build -t fedlotr .
# docker run --rm --shm-size 2g -v "$PWD/runs:/work/runs" fedlotr simulate --clients 50
#
# For an NVIDIA GPU, of which --device cuda has not seen one either, with the CUDA that its driver takes:
# docker build -t fedlotr:gpu --build-arg TORCH=cu128 .
# docker run --rm --gpus all --shm-size 2g -v "$PWD/runs:/work/runs" fedlotr:gpu simulate --device cuda

FROM python:3.11-slim

# Which of torch's builds, by uv's names: cpu is the smallest.
ARG TORCH=cpu
# Of the first command of README.md: `demo` brings a model, so that it needs no hub.
ARG EXTRAS=demo

ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1

COPY . /src
RUN pip install uv \
    && uv pip install --system --no-cache --torch-backend "$TORCH" -c /src/constraints.txt "/src[$EXTRAS]" \
    && rm -rf /src

# Nobody needs to be root to simulate; what a run leaves is this user's.
RUN useradd --create-home --uid 1000 fedlotr && mkdir /work && chown fedlotr /work
USER fedlotr
WORKDIR /work
ENTRYPOINT ["fedlotr"]
CMD ["--help"]
