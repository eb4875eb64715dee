// Package transfer is how the content of a volume travels from one node to another: a
// stream of frames, which whoever stands between the two passes on as bytes, and what
// the ends tell each other about it.
//
//	"csi-loop transfer 1\n"
//	head     what the source is, and how much data there is
//	data     a piece of it, and where it goes; any number, in order
//	end      the checksum of all
//
// A frame is 21 bytes, and then its payload as it is stored:
//
//	kind, 1 byte | offset, 8 | length, 4 | length as stored, 4 | checksum, 4
//
// Numbers are big endian. A payload that is stored shorter than it is long is
// compressed (S2's block format). The checksum is CRC-32C of the frame's first 17
// bytes and of the payload before it was compressed. The end's payload is SHA-256 over
// offset, length and payload of each data frame. What is not data is zeros, and not
// sent.
//
// A beat, which may come at any time before the end, says that the sender is busy. A
// fail takes the place of the end, and says why there is none.
//
// Invariants:
//
//   - A reader believes nothing: it keeps at most one frame, of MaxPiece bytes, and its
//     compressed form; a piece that lies outside the source that was announced, or
//     before an earlier one, ends the stream.
//   - Only a stream with an end, whose checksum is right, is whole.
//
// The package knows neither the network nor pools.
package transfer
