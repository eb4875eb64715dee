package link

import (
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"regexp"
	"time"

	"github.com/csi-loop/csi-loop/pkg/image"
)

const (
	// ProtocolMin is the oldest version of the protocol spoken here.
	ProtocolMin = 1
	// ProtocolMax is the newest.
	ProtocolMax = 1

	// ALPN names the protocol in the TLS handshake.
	ALPN = "csi-loop-link"
	// DefaultName is the name in the controller's certificate.
	DefaultName = "csi-loop-controller"
	// Audience is whom a node's token is for.
	Audience = "csi-loop.io"
	// AnswerKey is the trailer of every answer that a handler gave.
	AnswerKey = "csi-loop-answer"

	// HelloTime bounds everything before gRPC, on both sides.
	HelloTime = 10 * time.Second
	// PingEvery is the pause between pings: a dead peer is found within 13 s.
	PingEvery = 10 * time.Second
	// PingWait is how long the answer to one may take.
	PingWait = 3 * time.Second
	// MaxMessage bounds a message of the stream, in bytes: twice what the names of
	// MaxVolumes take.
	MaxMessage = 16 << 20
	// MaxAnswer bounds a node's answer to a call, in bytes: what a sidecar takes. Lists
	// are paged.
	MaxAnswer = 4 << 20

	// NonceSize is what a controller sends, in bytes.
	NonceSize = 32

	// MaxVolumes bounds the volumes of one node.
	MaxVolumes = 1 << 16
	// maxNode is the length of the longest node name, maxText that of other texts.
	maxNode, maxText = 253, 128
	// MaxPools bounds the pools of one node.
	MaxPools = 64
)

// ControllerHello is the first frame.
type ControllerHello struct {
	ProtocolMin int    `json:"protocolMin"`
	ProtocolMax int    `json:"protocolMax"`
	Driver      string `json:"driver"`
	Version     string `json:"version"`
	Nonce       []byte `json:"nonce"`
	// Self is the address that leads to this replica, Replicas those of all.
	Self     string   `json:"self"`
	Replicas []string `json:"replicas"`
}

// NodeHello is the node's answer.
type NodeHello struct {
	Protocol int    `json:"protocol"`
	Driver   string `json:"driver"`
	Version  string `json:"version"`
	NodeID   string `json:"nodeID"`
	Token    string `json:"token"`
	// Methods are the full names of the gRPC methods that the node answers.
	Methods     []string    `json:"methods"`
	DefaultPool string      `json:"defaultPool"`
	Pools       []PoolProof `json:"pools"`
	// Ticket makes this the connection of one transfer instead of a link; it has no
	// token, methods or pools then.
	Ticket []byte `json:"ticket,omitempty"`
}

// PoolProof is a pool, and the proof that the node has its key.
type PoolProof struct {
	ID        string `json:"id"`
	Name      string `json:"name"`
	Key       []byte `json:"key"`
	Signature []byte `json:"signature"`
}

// Verdict ends the hellos. Without Welcome, Message says why.
type Verdict struct {
	Welcome bool   `json:"welcome"`
	Message string `json:"message,omitempty"`
}

// ErrVersion means that the two ends have no protocol version in common.
var ErrVersion = errors.New("no common version of the link protocol")

// choose picks the protocol version for a controller's range.
func (h ControllerHello) choose() (int, error) {
	v := min(h.ProtocolMax, ProtocolMax)
	if v < max(h.ProtocolMin, ProtocolMin) {
		return 0, fmt.Errorf("%w: the controller (csi-loop %s) speaks %d to %d, this node %d to %d",
			ErrVersion, h.Version, h.ProtocolMin, h.ProtocolMax, ProtocolMin, ProtocolMax)
	}
	return v, nil
}

// Check says whether a controller may go on with this hello, whose token it has
// still to look at. binding is the channel's (Binding), nonce the controller's.
func (h NodeHello) Check(driver string, nonce, binding []byte) error {
	switch {
	case h.Protocol < ProtocolMin || h.Protocol > ProtocolMax:
		return fmt.Errorf("%w: the node (csi-loop %s) speaks %d, this controller %d to %d",
			ErrVersion, h.Version, h.Protocol, ProtocolMin, ProtocolMax)
	case h.Driver != driver:
		return fmt.Errorf("the node belongs to the driver %q, this controller to %q", h.Driver, driver)
	case h.NodeID == "" || len(h.NodeID) > maxNode:
		return fmt.Errorf("the node's ID has %d bytes, 1 to %d are allowed", len(h.NodeID), maxNode)
	case len(h.Version) > maxText || len(h.DefaultPool) > maxText:
		return errors.New("version or default pool are too long")
	case h.Token == "":
		return errors.New("the node has no token")
	case len(h.Pools) > MaxPools:
		return fmt.Errorf("%d pools, at most %d are allowed", len(h.Pools), MaxPools)
	}
	seen := make(map[string]bool, len(h.Pools))
	for _, p := range h.Pools {
		if seen[p.ID] {
			return fmt.Errorf("pool %q is there twice", p.ID)
		}
		seen[p.ID] = true
		if err := p.Check(h.NodeID, nonce, binding); err != nil {
			return err
		}
	}
	return nil
}

// Prove shows that the node has the pool's key, on one connection.
func Prove(p Pool, nonce, binding []byte, nodeID string) PoolProof {
	return PoolProof{ID: p.ID, Name: p.Name, Key: p.Key, Signature: p.Sign(statement(nonce, binding, nodeID, p.ID))}
}

// Check says whether the node has the pool's key. binding is the channel's, nonce
// what the controller sent on it.
func (p PoolProof) Check(nodeID string, nonce, binding []byte) error {
	if !poolName.MatchString(p.Name) {
		return fmt.Errorf("pool %.80q: not a name of a pool", p.Name)
	}
	if len(p.Key) != ed25519.PublicKeySize || image.PoolID(p.Key) != p.ID {
		return fmt.Errorf("pool %q (ID %.80s): the ID does not belong to the key", p.Name, p.ID)
	}
	if !ed25519.Verify(p.Key, statement(nonce, binding, nodeID, p.ID), p.Signature) {
		return fmt.Errorf("pool %q (ID %s): the signature is not that of the pool's key on this connection", p.Name, p.ID)
	}
	return nil
}

// poolName is what a pool can be called.
var poolName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,98}[a-z0-9])?$`)

// statement is what a pool's key signs. The purpose comes first, so that no other
// use of the key can be made to sign this.
func statement(nonce, binding []byte, nodeID, poolID string) []byte {
	b := []byte("csi-loop link: this node has this pool\x00")
	for _, part := range [][]byte{nonce, binding, []byte(nodeID), []byte(poolID)} {
		b = binary.BigEndian.AppendUint32(b, uint32(len(part)))
		b = append(b, part...)
	}
	sum := sha256.Sum256(b)
	return append([]byte("csi-loop-link-v1\x00"), sum[:]...)
}

// Binding is the same at both ends of one TLS connection, and of no other.
func Binding(s tls.ConnectionState) ([]byte, error) {
	return s.ExportKeyingMaterial("EXPORTER-csi-loop-link", nil, 32)
}
