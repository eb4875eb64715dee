package link

import (
	"bytes"
	"encoding/binary"
	"strings"
	"testing"
)

// Nobody is known yet when a hello comes: of its bytes, and of what is made of them,
// there is a bound. An empty pool has two bytes on the wire, and many in memory.
func TestHelloOfManyItems(t *testing.T) {
	frame := func(body string) *bytes.Buffer {
		return bytes.NewBuffer(append(binary.BigEndian.AppendUint32(nil, uint32(len(body))), body...))
	}
	for _, item := range []string{`"pools":[{}` + strings.Repeat(",{}", 20000) + `]`, `"methods":[""` + strings.Repeat(`,""`, 20000) + `]`} {
		var h NodeHello
		if err := ReadFrame(frame(`{`+item+`}`), &h); err == nil {
			t.Errorf("%d pools and %d methods were read", len(h.Pools), len(h.Methods))
		}
	}
	var h NodeHello
	body := `{"pools":[{"id":"a","name":"b","key":"","signature":""}` + strings.Repeat(`,{"id":"a","name":"b","key":"","signature":""}`, MaxPools-1) +
		`],"methods":["/a/b"` + strings.Repeat(`,"/a/b"`, 200) + `]}`
	if err := ReadFrame(frame(body), &h); err != nil || len(h.Pools) != MaxPools {
		t.Errorf("%d pools: %v", len(h.Pools), err)
	}
}
