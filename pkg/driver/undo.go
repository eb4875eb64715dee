package driver

import (
	"context"
	"time"
)

// undoTime bounds how long a call takes back what it did after its own context
// has ended.
const undoTime = 15 * time.Second

// undoContext is a context for taking back what a call did: it keeps the values
// of ctx (the logger) but not its end.
func undoContext(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), undoTime)
}
