// Package link is the connection between a node and a controller: what both
// ends say to each other, and the node's end of it (Agent). The controller's end
// is package router.
//
// The node dials. On a new TCP connection, in this order:
//
//	TLS 1.3          the node verifies the controller's certificate and name
//	ControllerHello  -> node        versions, a nonce, the replicas' addresses
//	NodeHello        -> controller  version, token, methods, pools with proofs
//	Verdict          -> node        welcome, or why not
//	gRPC             roles reversed: the node runs a grpc.Server on this one
//	                 connection, the controller is its client
//
// Hellos are frames: four bytes of length, big endian, then that much JSON.
// Unknown fields are ignored, so that a later version may add some.
//
// Over gRPC the node serves its CSI Controller service and the stream Sync, which
// the controller opens at once. On it the node sends the names of its volumes and
// its free space, first whole and then what changes, and fresh tokens; the
// controller sends the replicas' addresses and notices for people. The link lasts
// as long as the stream.
//
// The content of volumes travels on connections of their own, which a node makes when
// the controller asked for it or offered it: their NodeHello has a ticket and nothing
// else, and behind the Verdict there is a stream of package transfer instead of gRPC.
//
// Invariants:
//
//   - The node sends nothing, least of all its token, before the controller has
//     proven who it is.
//   - A pool's proof signs the controller's nonce, the TLS channel and the node's
//     name, so that it is worth nothing on any other connection.
//   - Nothing that a peer says before it is known makes this side keep more than
//     MaxHello bytes, or wait longer than a deadline.
//   - An answer that a handler of the node gave carries the trailer AnswerKey.
//     Whatever lacks it was made by the link itself and says nothing about the call.
package link
