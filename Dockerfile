# syntax=docker/dockerfile:1
# The driver and the programs it calls, on nothing: no shell, no package manager.
# Build with "make image", or for several architectures with
# "docker buildx build --platform linux/amd64,linux/arm64 .".

# Compiles on the builder's own architecture for the one that is asked for.
FROM --platform=$BUILDPLATFORM docker.io/library/golang:1.26-bookworm AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN --mount=type=cache,target=/go/pkg/mod go mod download
COPY cmd cmd
COPY pkg pkg
COPY internal internal
ARG VERSION=unknown
ARG COMMIT=
ARG TARGETOS=linux
ARG TARGETARCH
RUN --mount=type=cache,target=/go/pkg/mod --mount=type=cache,target=/root/.cache/go-build \
    CGO_ENABLED=0 GOOS=$TARGETOS GOARCH=$TARGETARCH \
    go build -trimpath -buildvcs=false -ldflags "-s -w -X main.version=$VERSION -X main.commit=$COMMIT" -o /csi-loop ./cmd/csi-loop

# Runs on the architecture that is asked for: ldd has to.
FROM docker.io/library/debian:bookworm-slim AS programs
RUN apt-get update && apt-get install -y --no-install-recommends btrfs-progs cryptsetup-bin e2fsprogs xfsprogs
COPY hack/image-root /usr/local/bin/image-root
# All that the driver ever runs; test/e2e/image proves it.
RUN image-root /image \
    mkfs.ext2 mkfs.ext3 mkfs.ext4 e2fsck resize2fs tune2fs mkfs.xfs mkfs.btrfs btrfstune cryptsetup

FROM scratch
COPY --from=programs /image /
COPY --from=build /csi-loop /usr/local/bin/csi-loop
ENV PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
ARG VERSION=unknown
ARG COMMIT=
LABEL org.opencontainers.image.title="csi-loop" \
      org.opencontainers.image.description="CSI driver for image files on loop devices" \
      org.opencontainers.image.source="https://github.com/csi-loop/csi-loop" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version=$VERSION \
      org.opencontainers.image.revision=$COMMIT
ENTRYPOINT ["/usr/local/bin/csi-loop"]
