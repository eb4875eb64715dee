package image

import "context"

// Step is told of a part of the work of a call as it begins, and its function as it
// ends, with its error. The context that it returns is that of the part.
type Step func(ctx context.Context, name string) (context.Context, func(err error))

// WithSteps has f told of what takes long: "create image", "format image" and, in
// them or alone, "copy data".
func WithSteps(f Step) Option { return func(s *Store) { s.steps = f } }

// step begins a part.
func (s *Store) step(ctx context.Context, name string) (inside context.Context, end func(err error)) {
	if s.steps == nil {
		return ctx, func(error) {}
	}
	return s.steps(ctx, name)
}
