package image

import "encoding/hex"

// formatUUID is the usual form of a UUID's 16 bytes.
func formatUUID(b []byte) string {
	s := hex.EncodeToString(b)
	return s[:8] + "-" + s[8:12] + "-" + s[12:16] + "-" + s[16:20] + "-" + s[20:32]
}
