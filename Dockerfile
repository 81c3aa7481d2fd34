# NVIDIA's image brings torch, Triton, NCCL and NVIDIA's apex, built for each other.
ARG PYTORCH_TAG=25.10-py3
FROM nvcr.io/nvidia/pytorch:${PYTORCH_TAG}

WORKDIR /opt/distmuon
COPY setup.py pyproject.toml LICENSE ./
COPY benchmarks ./benchmarks
COPY kernels ./kernels
COPY distmuon ./distmuon

# Whatever of the image's own stack a requirement names stays as it is: pip must keep it or fail.
ARG EXTRAS=train,hf
RUN python -m pip list --format=freeze | grep -iE '^(torch|torchvision|triton|pytorch-triton|numpy)==' >constraints.txt \
    && grep -q '^torch==' constraints.txt \
    && python -m pip install --no-cache-dir --constraint constraints.txt ".[${EXTRAS}]"

# The same number as the owner of mounted data lets ranks write there: --build-arg UID=$(id -u).
ARG UID=10001
RUN useradd --create-home --non-unique --uid "${UID}" distmuon
USER distmuon
WORKDIR /home/distmuon
COPY --chown=distmuon configs ./configs
COPY --chown=distmuon launch ./launch

CMD ["distmuon", "--help"]
