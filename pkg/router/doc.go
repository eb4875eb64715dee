// Package router is the controller mode of csi-loop: the CSI Identity and
// Controller services for Kubernetes' sidecars, which it answers by sending each
// call, as the same message, down the link to the node that owns the pool.
//
// It owns the controller's end of the links (server.go; the protocol is package
// link), the table of nodes and pools (table.go, standing.go), and the rules by which a call
// finds its node and what is answered while that node is away (route.go,
// create.go, list.go, capacity.go), and passes on the content of volumes that are
// copied from one node to another (transfer.go). It keeps no data: everything it knows, nodes
// tell it again when it is started anew. Kubernetes is behind three small
// interfaces (Authenticator, Roster, and a certificate); package kube has them.
//
// Invariants:
//
//   - A volume that may exist is never reported as gone: while its node is away,
//     a call for any well-formed ID is UNAVAILABLE. Only an ID that csi-loop could
//     not have made is an unknown volume.
//   - A list is whole or UNAVAILABLE, never short.
//   - CreateVolume looks its name up first: among the volumes of all nodes, those
//     that are being made on any, and the calls whose answer was lost.
//   - A node is who its token says. It has the pools whose keys it proved to have
//     on this very connection, and a pool is on one node: the first, until that is
//     forgotten, also while it is away or linked without the pool, if copies are known.
//   - The code of an answer is the node's word only if the answer carries
//     link.AnswerKey. Whatever the link itself made becomes UNAVAILABLE.
//   - A connection with a ticket is good for one transfer: that for which the ticket
//     was made, between the nodes whose links are those of then.
//   - No lock is held during a call, and no call waits for another node's.
//
// Lock order: session.mu is never held together with table.mu.
package router
