# docker build -t memdlm .
# docker run --rm --gpus all --ipc=host -v "$PWD:/workspace" -v "$HOME/.cache/huggingface:/cache" memdlm train recipe:llada2_mini
#
# No CUDA image: torch's own wheels have CUDA 13.0, and the driver is the host's (580 or newer, NVIDIA Container Toolkit).
FROM python:3.11-slim

# triton compiles what starts its kernels
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

COPY . /src
RUN pip install --no-cache-dir --constraint /src/constraints.txt "/src[deepspeed,eval,quant]" && rm -rf /src

ENV HF_HOME=/cache NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /workspace
ENTRYPOINT ["memdlm"]
CMD ["info"]
