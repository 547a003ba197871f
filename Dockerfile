# An environment to develop in: compiler, Python and this checkout with all that its tests need.
#   docker build -t mrcn-fast . && docker run -it mrcn-fast make test
FROM python:3.12-slim-bookworm

RUN apt-get update \
  && apt-get install -y --no-install-recommends g++ git make \
  && rm -rf /var/lib/apt/lists/*

WORKDIR /mrcn_fast
COPY . .

# torch's build for the CPU. For a GPU, start from an image with CUDA and leave TORCH at its default.
ARG TORCH=torch==2.13.0+cpu
ENV PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu TORCH=${TORCH} VENV=/opt/venv PATH=/opt/venv/bin:${PATH}
# For every instruction set: an image runs on other processors too.
RUN MRCN_FAST_ISAS=all make install EXTRAS=all
