package image

import "context"

// MkfsCommand is what Create runs on the new image of a volume, program first and
// image last, so that a person can repeat it and a benchmark can run the same. It
// is nil for a raw block volume. Errors are those of Create for the Spec, and
// ErrUnsupported when this machine lacks the program.
func MkfsCommand(ctx context.Context, spec Spec) ([]string, error) {
	s, err := spec.normalise()
	if err != nil || s.Filesystem == "" {
		return nil, err
	}
	found, err := newTools(toolDirs()).find(ctx, s.Filesystem)
	if err != nil {
		return nil, err
	}
	argv := append([]string{found.path}, mkfsArguments(s, found.help)...)
	return append(argv, imageFile), nil
}
