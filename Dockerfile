# syntax=docker/dockerfile:1
# The driver and the programs it calls. Build with "make image".

FROM --platform=$BUILDPLATFORM docker.io/library/golang:1.26-bookworm AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN --mount=type=cache,target=/go/pkg/mod go mod download
COPY cmd cmd
COPY pkg pkg
COPY internal internal
ARG VERSION=unknown
ARG COMMIT=
ARG TARGETOS
ARG TARGETARCH
RUN --mount=type=cache,target=/go/pkg/mod --mount=type=cache,target=/root/.cache/go-build \
    CGO_ENABLED=0 GOOS=$TARGETOS GOARCH=$TARGETARCH \
    go build -trimpath -buildvcs=false -ldflags "-s -w -X main.version=$VERSION -X main.commit=$COMMIT" -o /csi-loop ./cmd/csi-loop

FROM docker.io/library/debian:bookworm-slim
# The driver runs mkfs.* and e2fsck (with resize2fs for a filesystem that is not mounted).
RUN apt-get update && \
    apt-get install -y --no-install-recommends btrfs-progs e2fsprogs xfsprogs && \
    rm -rf /var/lib/apt/lists/*
COPY --from=build /csi-loop /usr/local/bin/csi-loop
ARG VERSION=unknown
LABEL org.opencontainers.image.title="csi-loop" \
      org.opencontainers.image.description="CSI driver for image files on loop devices" \
      org.opencontainers.image.source="https://github.com/csi-loop/csi-loop" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version=$VERSION
ENTRYPOINT ["/usr/local/bin/csi-loop"]
