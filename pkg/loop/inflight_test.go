package loop

import "testing"

func TestParseInFlight(t *testing.T) {
	for text, want := range map[string]int{"       0        0": 0, "       3        4\n": 7, "": 0, "x 1": -1} {
		if got, err := parseInFlight(text); (err != nil) != (want < 0) || err == nil && got != want {
			t.Errorf("parseInFlight(%q) = %d, %v", text, got, err)
		}
	}
}
