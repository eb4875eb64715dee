package main

import (
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/csi-loop/csi-loop/cmd/csi-loop/survey"
)

const doctorHelp = `Look for what is wrong with this node, and say what mends it.

The node: kernel, loop driver, programs, capabilities, /dev, and whether pods see
what is mounted below the kubelet's directory. The installation: each pool and its
volumes, and whether records, loop devices and mounts agree. A level is given to
each finding: ok, note, warning (works, but not as it should), problem.

--repair does for the pools what the next start of csi-loop does anyway: it removes
what interrupted calls left, completes interrupted growths and makes files private.
Pools that a running csi-loop serves are left to it. Everything else is for a person.

The exit status is 0 without a problem, 3 with one, 2 when the command line, the
environment or the file are wrong, and 1 when it could not look.`

// unwellError is that problems were found.
type unwellError struct{ problems int }

func (e *unwellError) Error() string { return fmt.Sprintf("%d problem(s) found", e.problems) }

// diagnosis is what doctor finds.
type diagnosis struct {
	Findings []survey.Finding  `json:"findings"`
	Problems int               `json:"problems"`
	Warnings int               `json:"warnings"`
	Repaired map[string]string `json:"repaired,omitempty"` // by pool; "" or what went wrong
}

func newDoctorCommand() *cobra.Command {
	repair := false
	c := &cobra.Command{Use: "doctor", Short: "Look for what is wrong with this node", Long: doctorHelp, Args: cobra.NoArgs}
	s := newSurveyCommand(c, "text or json")
	c.Flags().BoolVar(&repair, "repair", false, "do what is safe: see above")
	c.RunE = func(c *cobra.Command, _ []string) error { return failed(s.doctor(c, repair)) }
	return c
}

func (s *surveyCommand) doctor(c *cobra.Command, repair bool) error {
	if err := s.check("text", "json"); err != nil {
		return err
	}
	cfg, err := s.config()
	if err != nil {
		return err
	}
	if err := completePath(); err != nil {
		return fmt.Errorf("PATH: %w", err)
	}
	d, err := diagnose(c.Context(), cfg, repair)
	if err != nil {
		return err
	}
	if s.output == "json" {
		err = printJSON(c.OutOrStdout(), d)
	} else {
		err = d.print(c.OutOrStdout())
	}
	if err == nil && d.Problems > 0 {
		err = &unwellError{d.Problems}
	}
	return err
}

// settleTime is how long a finding must last beside a running driver: what is seen
// between two steps of a call is none.
const settleTime = time.Second

func diagnose(ctx context.Context, cfg survey.Config, repair bool) (*diagnosis, error) {
	node := survey.LookAtNode(ctx, cfg)
	d := &diagnosis{Findings: survey.CheckNode(node)}
	site, err := survey.Look(ctx, cfg)
	if err != nil {
		return nil, err
	}
	if repair {
		d.Repaired = map[string]string{}
		for pool, err := range survey.Repair(ctx, site, cfg.Pools) {
			d.Repaired[pool] = ""
			if err != nil {
				d.Repaired[pool] = oneLine(err)
			}
		}
		if site, err = survey.Look(ctx, cfg); err != nil {
			return nil, err
		}
	}
	found := survey.CheckSite(site, cfg, node.Serving)
	if node.Serving {
		select {
		case <-time.After(settleTime):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		if site, err = survey.Look(ctx, cfg); err != nil {
			return nil, err
		}
		again := survey.CheckSite(site, cfg, true)
		found = slices.DeleteFunc(again, func(f survey.Finding) bool { return f.Level != survey.OK && !slices.Contains(found, f) })
	}
	d.Findings = append(d.Findings, found...)
	for _, f := range d.Findings {
		switch f.Level {
		case survey.Problem:
			d.Problems++
		case survey.Warning:
			d.Warnings++
		case survey.OK, survey.Note:
		}
	}
	return d, nil
}

func (d *diagnosis) print(out io.Writer) error {
	var rows [][]string
	for _, f := range d.Findings {
		rows = append(rows, []string{string(f.Level), f.Subject, f.Message})
		if f.Fix != "" && f.Level != survey.OK {
			rows = append(rows, []string{" ", " ", "-> " + f.Fix})
		}
	}
	for _, pool := range slices.Sorted(maps.Keys(d.Repaired)) {
		result := "repaired"
		if d.Repaired[pool] != "" {
			result = d.Repaired[pool]
		}
		rows = append(rows, []string{"repair", "pool " + pool, result})
	}
	if err := printTable(out, rows); err != nil {
		return err
	}
	_, err := fmt.Fprintf(out, "\n%d problem(s), %d warning(s)\n", d.Problems, d.Warnings)
	return err
}
