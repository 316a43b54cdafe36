package main

import (
	"io"
	"log/slog"
	"os"

	"github.com/talkingdata/oam-docker-ipam/systemd"
)

// logFormat is how the log is written.
type logFormat string

// The formats of the log.
const (
	// logAuto is journald's own where standard error goes there, else text.
	logAuto logFormat = "auto"
	logText logFormat = "text"
	logJSON logFormat = "json"
)

var logFormats = []logFormat{logAuto, logText, logJSON}

// level is the least that is logged: all of it with debug, else what is usual.
func level(debug bool, usual slog.Level) slog.Level {
	if debug {
		return slog.LevelDebug
	}
	return usual
}

// newLogger logs what is at least of a level.
func newLogger(w io.Writer, format logFormat, level slog.Leveler) *slog.Logger {
	options := &slog.HandlerOptions{Level: level}
	file, _ := w.(*os.File)
	journal := file != nil && systemd.JournalConnected(file)
	if journal {
		// It has a time for each line.
		options.ReplaceAttr = func(groups []string, a slog.Attr) slog.Attr {
			if len(groups) == 0 && a.Key == slog.TimeKey {
				return slog.Attr{}
			}
			return a
		}
	}
	if format == logJSON {
		return slog.New(slog.NewJSONHandler(w, options))
	}
	text := slog.NewTextHandler(w, options)
	if format == logText || !journal {
		return slog.New(text)
	}
	return slog.New(systemd.NewJournalHandler(level, text))
}
